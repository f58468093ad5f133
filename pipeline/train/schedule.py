"""Learning rates as pure functions of the samples seen, the run's one clock."""

import math

from pipeline.config import Schedule
from pipeline.derived import Derived

_ONE_CYCLE_START = 1 / 25  # of the peak rate, as torch.optim.lr_scheduler.OneCycleLR's


def learning_rate(schedule: Schedule, derived: Derived, samples_seen: int) -> float:
    """The rate of the step that takes samples `samples_seen ... samples_seen + global_batch_size - 1`.

    During warm-up the rate rises linearly with the samples seen after the step, so that the first step is never
    at the full rate and the first one past the warm-up is. `step` (He et al. 2016) multiplies by `gamma` at each
    milestone; `cosine` (Loshchilov & Hutter 2017, without restarts) and `linear` fall to `end` at the end of the run;
    `one-cycle` (Smith & Topin 2018) rises from 1/25 of the peak for the share `rise` of the run and then falls to
    `end`, both along a cosine.
    """
    peak, total = derived.peak_lr, derived.total_samples
    warmup = schedule.warmup_epochs * derived.train_samples
    if samples_seen < warmup:
        return peak * min(1.0, (samples_seen + derived.global_batch_size) / warmup)
    match schedule.name:
        case "step":
            passed = sum(samples_seen >= m * derived.train_samples for m in schedule.milestones)
            return peak * schedule.gamma**passed
        case "linear":
            return peak * (1 + (schedule.end - 1) * (samples_seen - warmup) / (total - warmup))
        case "cosine":
            return peak * _along_cosine(1, schedule.end, (samples_seen - warmup) / (total - warmup))
        case "one-cycle":
            top = schedule.rise * total
            if samples_seen < top:
                return peak * _along_cosine(_ONE_CYCLE_START, 1, samples_seen / top)
            return peak * _along_cosine(1, schedule.end, (samples_seen - top) / (total - top))


def _along_cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))
