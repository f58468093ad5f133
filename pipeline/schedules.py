"""The shapes of the learning rate after warm-up: its share of the peak at each point of the run, by arithmetic."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_ONE_CYCLE_START = 1 / 25  # of the peak rate, as torch.optim.lr_scheduler.OneCycleLR's


@dataclass(frozen=True)
class Point:
    """Where the run is, in samples; `warmup` is when the warm-up ends, `epoch` an epoch's length."""

    seen: int
    warmup: float
    total: int
    epoch: int

    @property
    def progress(self) -> float:
        """The share of the run after warm-up that is over, from 0."""
        return (self.seen - self.warmup) / (self.total - self.warmup)


@dataclass(frozen=True)
class Shape:
    """`share(schedule, point)`, where `schedule` is the config's section; `reads` are its keys that count."""

    share: Callable[[Any, Point], float]
    reads: tuple[str, ...] = ()


def _step(schedule: Any, at: Point) -> float:
    """He et al. 2016: times `gamma` at each milestone."""
    return schedule.gamma ** sum(at.seen >= milestone * at.epoch for milestone in schedule.milestones)


def _linear(schedule: Any, at: Point) -> float:
    return 1 + (schedule.min_lr_ratio - 1) * at.progress


def _cosine(schedule: Any, at: Point) -> float:
    """Loshchilov & Hutter 2017, without restarts: falls to `min_lr_ratio` at the end of the run."""
    return _along_cosine(1, schedule.min_lr_ratio, at.progress)


def _one_cycle(schedule: Any, at: Point) -> float:
    """Smith & Topin 2018: from 1/25 for the share `pct_start` of the run up to the peak, then to `min_lr_ratio`, along cosines."""
    top = schedule.pct_start * at.total
    if at.seen < top:
        return _along_cosine(_ONE_CYCLE_START, 1, at.seen / top)
    return _along_cosine(1, schedule.min_lr_ratio, (at.seen - top) / (at.total - top))


def _along_cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


BUILT_IN = {
    "step": Shape(_step, ("milestones", "gamma")),
    "cosine": Shape(_cosine, ("min_lr_ratio",)),
    "linear": Shape(_linear, ("min_lr_ratio",)),
    "one-cycle": Shape(_one_cycle, ("pct_start", "min_lr_ratio")),
}
