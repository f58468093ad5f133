"""Dropout seeds as a function of the run's seed, step, micro-batch and rank."""

import numpy as np
import torch
import torch.distributed as dist

from pipeline.config import RunConfig
from pipeline.model.timm_models import is_stochastic


def seed_dropout(config: RunConfig, step: int, micro: int) -> None:
    """Seeds torch for a micro-batch of this rank, where the model has dropout, so that resumed runs repeat it."""
    if is_stochastic(config.model):
        sequence = np.random.SeedSequence([config.run.seed, step, micro, dist.get_rank()])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
