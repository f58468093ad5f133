"""What the end of a run needs, tried at its start: room for the checkpoints, and a registry that takes the model."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from launch.prepare import Prepared
from pipeline.config import RunConfig
from pipeline.data.space import gigabytes
from pipeline.errors import UserError
from pipeline.model.nets import size
from pipeline.tracking.database import Unreachable
from pipeline.tracking.registry import check_rights
from pipeline.tracking.stores import shown, sqlite_file, stores_of
from pipeline.train.checkpoint import checkpoint_root, checkpoints
from pipeline.train.room import checkpoint_bytes, kept_checkpoints, package_bytes


def check_room(prepared: Prepared) -> None:
    """Looks whether the disks hold the run's checkpoints and the model's package.

    Raises:
        UserError: one does not; the message says what takes how much.
    """
    config, run_dir = prepared.config, prepared.run_dir
    parameters = size(config.model, prepared.derived.num_classes, config.data.image_size).parameters
    each, package = checkpoint_bytes(config, parameters), package_bytes(parameters)
    kept = max(1, kept_checkpoints(config) - len(checkpoints(checkpoint_root(run_dir))))
    file = sqlite_file(stores_of(config).tracking)
    artifacts = Path(config.run.output) if file is None else file.parent
    wanted = [
        (Path(config.run.output), kept * each, f"{kept} checkpoints of {gigabytes(each)} (checkpoint.keep_last, ...)"),
        (
            Path(tempfile.gettempdir()),
            package,
            f"the model's package of {gigabytes(package)} while it is made (TMPDIR)",
        ),
    ]
    if file is not None:
        wanted.append((artifacts, package, f"the registered model of {gigabytes(package)}"))
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for place, needed, what in wanted:
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        disks.setdefault(there.stat().st_dev, []).append((there, needed, what))
    for on_disk in disks.values():
        place, needed = on_disk[0][0], sum(of for _, of, _ in on_disk)
        free = shutil.disk_usage(place).free
        if needed > free:
            raise UserError(
                f"run.output={config.run.output}: the disk of {place} has {gigabytes(free)} free, this run needs about "
                f"{gigabytes(needed)} there: {'; '.join(what for _, _, what in on_disk)}. Make room, keep fewer "
                f"checkpoints, or choose another place."
            )


def check_registry(config: RunConfig, told: Callable[[str], None]) -> None:
    """Looks whether the registry will take the run's model; one that is away is told with `on_unreachable=spool`.

    Raises:
        UserError: it refuses, or is away.
    """
    stores = stores_of(config)
    try:
        check_rights(config.tracking.register_as or config.model.name, stores)
    except Unreachable as error:
        if config.tracking.on_unreachable == "fail":
            raise
        if stores.apart:
            told(f"{error} The registry at {shown(stores.registry)} is needed at the end of the run.")
