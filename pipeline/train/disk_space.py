"""The room that a run's checkpoints and its registered model take on a disk, by arithmetic, and whether it is there."""

import math
import shutil
import tempfile
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.data.space import format_bytes
from pipeline.errors import UserError
from pipeline.extension_points import OPTIMIZERS
from pipeline.model.timm_models import size
from pipeline.tracking.stores import sqlite_file, stores_from_config
from pipeline.train.checkpoint import checkpoint_root, checkpoints
from pipeline.train.setup import RunSetup

_BYTES = 4  # of a number: checkpoints are in fp32 whatever the precision


def moments(config: RunConfig) -> int:
    """How many numbers the optimizer keeps for each parameter."""
    return OPTIMIZERS[config.optim.name].moments


def checkpoint_bytes(config: RunConfig, parameters: int) -> int:
    """The size of a checkpoint: weights, the optimizer's state, and the average where there is one."""
    return _BYTES * parameters * (1 + moments(config) + (config.ema.decay is not None))


def kept_checkpoints(config: RunConfig) -> int:
    """The most checkpoints that a run has on the disk at once: those kept, the best, and the one being written."""
    keep, epochs = config.checkpoint, config.train.epochs
    periodic = 0 if keep.keep_every_epochs is None else math.floor(epochs / keep.keep_every_epochs)
    kept = keep.keep_last + 1 + periodic
    if keep.every_samples is None and keep.every_minutes is None:
        kept = min(kept, math.ceil(epochs / min(keep.every_epochs, config.eval.every_epochs)))
    return kept + 1


def package_bytes(parameters: int) -> int:
    """The size of the model as it is registered."""
    return _BYTES * parameters


def check_disk_space(setup: RunSetup) -> None:
    """Looks whether the disks hold the run's checkpoints and the model's package.

    Raises:
        UserError: one does not; the message says what takes how much.
    """
    config, run_dir = setup.config, setup.run_dir
    parameters = size(config.model, setup.derived.num_classes, config.data.image_size).parameters
    each, package = checkpoint_bytes(config, parameters), package_bytes(parameters)
    kept = max(1, kept_checkpoints(config) - len(checkpoints(checkpoint_root(run_dir))))
    file = sqlite_file(stores_from_config(config).tracking)
    artifacts = Path(config.run.output) if file is None else file.parent
    wanted = [
        (
            Path(config.run.output),
            kept * each,
            f"{kept} checkpoints of {format_bytes(each)} (checkpoint.keep_last, ...)",
        ),
        (
            Path(tempfile.gettempdir()),
            package,
            f"the model's package of {format_bytes(package)} while it is made (TMPDIR)",
        ),
    ]
    if file is not None:
        wanted.append((artifacts, package, f"the registered model of {format_bytes(package)}"))
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for place, needed, what in wanted:
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        disks.setdefault(there.stat().st_dev, []).append((there, needed, what))
    for on_disk in disks.values():
        place, needed = on_disk[0][0], sum(of for _, of, _ in on_disk)
        free = shutil.disk_usage(place).free
        if needed > free:
            raise UserError(
                f"run.output={config.run.output}: the disk of {place} has {format_bytes(free)} free, this run needs "
                f"about {format_bytes(needed)} there: {'; '.join(what for _, _, what in on_disk)}. Make room, keep "
                f"fewer checkpoints, or choose another place."
            )
