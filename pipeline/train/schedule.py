"""Learning rate schedules as pure functions of the samples seen."""

from pipeline.config_train import Schedule
from pipeline.derived import Derived
from pipeline.extension_points import SCHEDULES, RunPosition


def learning_rate(schedule: Schedule, derived: Derived, samples_seen: int) -> float:
    """Returns the learning rate of the step on samples `samples_seen ... samples_seen + global_batch_size - 1`.

    During warmup the learning rate rises linearly with the samples seen after the step, so that the first step never
    has the peak learning rate, and the first step after the warmup does. Then `pipeline.lr_schedules` gives its
    fraction of the peak.
    """
    peak, warmup = derived.peak_lr, schedule.warmup_epochs * derived.train_samples
    if samples_seen < warmup:
        return peak * min(1.0, (samples_seen + derived.global_batch_size) / warmup)
    at = RunPosition(samples_seen, warmup, derived.total_samples, derived.train_samples)
    return peak * SCHEDULES[schedule.name].lr_ratio(schedule, at)
