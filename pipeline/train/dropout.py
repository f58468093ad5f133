"""Dropout as a function of the seed and the place in the run."""

import numpy as np
import torch
import torch.distributed as dist

from pipeline.config import RunConfig
from pipeline.model.timm_models import draws


def seed_dropout(config: RunConfig, step: int, micro: int) -> None:
    """Seeds torch for a micro-batch of this rank, where the model drops anything, so that resumed runs repeat it."""
    if draws(config.model):
        numbers = np.random.SeedSequence([config.run.seed, step, micro, dist.get_rank()])
        torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0]))
