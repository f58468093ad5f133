"""The room that a run's checkpoints and its registered model take on a disk, by arithmetic."""

import math

from pipeline.config import RunConfig
from pipeline.seams import OPTIMIZERS

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
