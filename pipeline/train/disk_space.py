"""Estimates the disk space of a run's checkpoints and its registered model, and checks that it is free."""

import math
import shutil
import tempfile
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.extension_points import OPTIMIZERS
from pipeline.formatting import format_bytes
from pipeline.model.timm_models import size
from pipeline.tracking.stores import sqlite_file, stores_from_config
from pipeline.train.checkpoint import checkpoint_root, checkpoints
from pipeline.train.setup import RunSetup

_FP32_BYTES = 4  # checkpoints are in fp32 at every training precision


def moments(config: RunConfig) -> int:
    """Returns how many fp32 values the optimizer stores per parameter (momentum: 1, Adam: 2)."""
    return OPTIMIZERS[config.optim.name].moments


def checkpoint_bytes(config: RunConfig, parameters: int) -> int:
    """Returns the size of a checkpoint: weights, optimizer state, and EMA where the run has one."""
    return _FP32_BYTES * parameters * (1 + moments(config) + (config.ema.decay is not None))


def kept_checkpoints(config: RunConfig) -> int:
    """Returns the most checkpoints on the disk at once: those kept, the best, and the one being written."""
    keep, epochs = config.checkpoint, config.train.epochs
    periodic = 0 if keep.keep_every_epochs is None else math.floor(epochs / keep.keep_every_epochs)
    kept = keep.keep_last + 1 + periodic
    if keep.every_samples is None and keep.every_minutes is None:
        kept = min(kept, math.ceil(epochs / min(keep.every_epochs, config.eval.every_epochs)))
    return kept + 1


def package_bytes(parameters: int) -> int:
    """Returns the size of the registered model."""
    return _FP32_BYTES * parameters


def check_disk_space(setup: RunSetup) -> None:
    """Checks that the disks have space for the run's checkpoints and the registered model.

    Raises:
        UserError: a disk has too little; the message lists what needs how much.
    """
    config, run_dir = setup.config, setup.run_dir
    parameters = size(config.model, setup.derived.num_classes, config.data.image_size).parameters
    each, package = checkpoint_bytes(config, parameters), package_bytes(parameters)
    kept = max(1, kept_checkpoints(config) - len(checkpoints(checkpoint_root(run_dir))))
    file = sqlite_file(stores_from_config(config).tracking)
    artifacts = Path(config.run.output) if file is None else file.parent
    required = [
        (
            Path(config.run.output),
            kept * each,
            f"{kept} checkpoints of {format_bytes(each)} (checkpoint.keep_last, ...)",
        ),
        (
            Path(tempfile.gettempdir()),
            package,
            f"the model's package of {format_bytes(package)} until it is registered (TMPDIR)",
        ),
    ]
    if file is not None:
        required.append((artifacts, package, f"the registered model of {format_bytes(package)}"))
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for path, size_bytes, what in required:
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        disks.setdefault(existing.stat().st_dev, []).append((existing, size_bytes, what))
    for on_disk in disks.values():
        folder, needed = on_disk[0][0], sum(size_bytes for _, size_bytes, _ in on_disk)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"run.output={config.run.output}: the disk of {folder} has {format_bytes(free)} free, this run needs "
                f"about {format_bytes(needed)} there: {'; '.join(what for _, _, what in on_disk)}. Free disk space, "
                f"keep fewer checkpoints, or choose another folder."
            )
