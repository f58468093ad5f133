"""Learning rate schedules after warmup: the learning rate as a fraction of the peak, from the samples seen."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_ONE_CYCLE_START = 1 / 25  # of the peak learning rate, as in torch.optim.lr_scheduler.OneCycleLR


@dataclass(frozen=True)
class RunPosition:
    """A position in the run, in samples: samples seen, end of warmup, length of the run, length of an epoch."""

    samples_seen: int
    warmup_samples: float
    total_samples: int
    samples_per_epoch: int

    @property
    def progress(self) -> float:
        """The completed fraction of the run after warmup, in [0, 1)."""
        return (self.samples_seen - self.warmup_samples) / (self.total_samples - self.warmup_samples)


@dataclass(frozen=True)
class LrSchedule:
    """A schedule: `lr_ratio(schedule, position)` returns learning rate / peak learning rate.

    Args:
        lr_ratio: Takes the config's `schedule` section and a `RunPosition`.
        reads: The keys of `schedule.*` that it uses; setting others is warned about.
    """

    lr_ratio: Callable[[Any, RunPosition], float]
    reads: tuple[str, ...] = ()


def _step(schedule: Any, at: RunPosition) -> float:
    """He et al. 2016: multiplies the learning rate by `gamma` at each milestone."""
    return schedule.gamma ** sum(
        at.samples_seen >= milestone * at.samples_per_epoch for milestone in schedule.milestones
    )


def _linear(schedule: Any, at: RunPosition) -> float:
    return 1 + (schedule.min_lr_ratio - 1) * at.progress


def _cosine(schedule: Any, at: RunPosition) -> float:
    """Loshchilov & Hutter 2017, without restarts: decays to `min_lr_ratio` at the end of the run."""
    return _cosine_annealing(1, schedule.min_lr_ratio, at.progress)


def _one_cycle(schedule: Any, at: RunPosition) -> float:
    """Smith & Topin 2018: cosine from peak / 25 to the peak over `pct_start` of the run, then to `min_lr_ratio`."""
    peak_at = schedule.pct_start * at.total_samples
    if at.samples_seen < peak_at:
        return _cosine_annealing(_ONE_CYCLE_START, 1, at.samples_seen / peak_at)
    return _cosine_annealing(1, schedule.min_lr_ratio, (at.samples_seen - peak_at) / (at.total_samples - peak_at))


def _cosine_annealing(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


BUILT_IN = {
    "step": LrSchedule(_step, ("milestones", "gamma")),
    "cosine": LrSchedule(_cosine, ("min_lr_ratio",)),
    "linear": LrSchedule(_linear, ("min_lr_ratio",)),
    "one-cycle": LrSchedule(_one_cycle, ("pct_start", "min_lr_ratio")),
}
