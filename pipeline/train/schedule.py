"""Learning rates as pure functions of the samples seen, the run's one clock."""

from pipeline.config import Schedule
from pipeline.derived import Derived
from pipeline.extension_points import SCHEDULES, RunPosition


def learning_rate(schedule: Schedule, derived: Derived, samples_seen: int) -> float:
    """The rate of the step that takes samples `samples_seen ... samples_seen + global_batch_size - 1`.

    During warm-up the rate rises linearly with the samples seen after the step, so that the first step is never
    at the full rate and the first one past the warm-up is. Then it is a share of the peak (`pipeline.lr_schedules`).
    """
    peak, warmup = derived.peak_lr, schedule.warmup_epochs * derived.train_samples
    if samples_seen < warmup:
        return peak * min(1.0, (samples_seen + derived.global_batch_size) / warmup)
    at = RunPosition(samples_seen, warmup, derived.total_samples, derived.train_samples)
    return peak * SCHEDULES[schedule.name].lr_ratio(schedule, at)
