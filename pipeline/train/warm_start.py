"""Finds what a run starts from: pretrained weights, a teacher, or another run's checkpoint to resume from."""

import re
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.model.pretrained import NO_PRETRAINED, Pretrained
from pipeline.tracking.stores import stores_from_config
from pipeline.train.checkpoint import MANIFEST, checkpoint_root, checkpoints, latest_valid, verify
from pipeline.train.model_source import resolve_model

_RUN_ID = re.compile("[0-9a-f]{32}")


def find_pretrained(config: RunConfig) -> Pretrained:
    """Returns the paths of `model.weights` and `loss.teacher`; caches registered models in `run.output/models`.

    Raises:
        UserError: there is no such file, folder or registered model.
    """
    if config.model.weights is None and config.loss.teacher is None:
        return NO_PRETRAINED
    cache, stores = Path(config.run.output) / "models", stores_from_config(config)
    weights, teacher = (
        None if path_or_uri is None else resolve_model(path_or_uri, key, cache, stores)
        for key, path_or_uri in (("model.weights", config.model.weights), ("loss.teacher", config.loss.teacher))
    )
    return Pretrained(weights, teacher)


def find_checkpoint(resume: str, config: RunConfig) -> Path:
    """Returns the checkpoint to resume from.

    `resume` is a checkpoint's folder, a run's folder (its latest valid checkpoint), or an MLflow run id.

    Raises:
        UserError: there is no checkpoint, it is corrupt, or the run has checkpoints of its own.
    """
    own = Path(config.run.output) / str(config.run.name)
    if checkpoints(checkpoint_root(own)):
        raise UserError(
            f"--resume={resume}: the run {config.run.name} has checkpoints of its own, and resumes from its latest. "
            f"Omit --resume, or choose another run.name."
        )
    path = Path(resume).expanduser()
    if _RUN_ID.fullmatch(resume) and not path.exists():
        from pipeline.tracking.queries import run_folder  # MLflow takes seconds to import

        path = run_folder(resume, stores_from_config(config).tracking)
    if (path / MANIFEST).is_file():
        reason = verify(path)
        if reason is not None:
            raise UserError(f"--resume={resume} is corrupt: {reason}.")
        return path
    skipped: list[str] = []
    found = latest_valid(checkpoint_root(path), skipped.append)
    if found is None:
        reasons = f" ({'; '.join(skipped)})" if skipped else ""
        raise UserError(f"--resume={resume}: there is no valid checkpoint in {path}{reasons}.")
    return found
