"""Dropout as a function of the seed and the place in the run."""

import numpy as np
import torch
import torch.distributed as dist

from pipeline.config import RunConfig
from pipeline.model.timm_models import is_stochastic


def seed_dropout(config: RunConfig, step: int, micro: int) -> None:
    """Seeds torch for a micro-batch of this rank, where the model drops anything, so that resumed runs repeat it."""
    if is_stochastic(config.model):
        numbers = np.random.SeedSequence([config.run.seed, step, micro, dist.get_rank()])
        torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0]))
