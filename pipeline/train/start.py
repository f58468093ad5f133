"""What a run starts from: weights, a teacher, another run's checkpoint."""

import re
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.model.pretrained import NO_PRETRAINED, Pretrained
from pipeline.tracking.stores import stores_from_config
from pipeline.train.checkpoint import MANIFEST, checkpoint_root, checkpoints, newest_valid, verify
from pipeline.train.locate import locate

_RUN_ID = re.compile("[0-9a-f]{32}")


def find_sources(config: RunConfig) -> Pretrained:
    """The weights to start from and the teacher; registered models are kept in `run.output/models`.

    Raises:
        UserError: there is no such file, folder or registered model.
    """
    if config.model.weights is None and config.loss.teacher is None:
        return NO_PRETRAINED
    cache, stores = Path(config.run.output) / "models", stores_from_config(config)
    weights, teacher = (
        None if place is None else locate(place, key, cache, stores)
        for key, place in (("model.weights", config.model.weights), ("loss.teacher", config.loss.teacher))
    )
    return Pretrained(weights, teacher)


def find_checkpoint(place: str, config: RunConfig) -> Path:
    """The checkpoint to go on from: a folder, the newest valid one of a run's folder, or that of an MLflow run's id.

    Raises:
        UserError: there is none, it is corrupt, or the run has checkpoints of its own.
    """
    own = Path(config.run.output) / str(config.run.name)
    if checkpoints(checkpoint_root(own)):
        raise UserError(
            f"--resume={place}: the run {config.run.name} has checkpoints of its own, and goes on from the newest. "
            f"Leave --resume out, or choose another run.name."
        )
    path = Path(place).expanduser()
    if _RUN_ID.fullmatch(place) and not path.exists():
        from pipeline.tracking.queries import run_folder  # MLflow takes seconds to import

        path = run_folder(place, stores_from_config(config).tracking)
    if (path / MANIFEST).is_file():
        reason = verify(path)
        if reason is not None:
            raise UserError(f"--resume={place} is corrupt: {reason}.")
        return path
    skipped: list[str] = []
    found = newest_valid(checkpoint_root(path), skipped.append)
    if found is None:
        told = f" ({'; '.join(skipped)})" if skipped else ""
        raise UserError(f"--resume={place}: there is no valid checkpoint in {path}{told}.")
    return found
