"""Learning rates as pure functions of the samples seen, the run's one clock."""

import math

from pipeline.config import Derived, Optim, Schedule


def learning_rate(schedule: Schedule, optim: Optim, derived: Derived, samples_seen: int) -> float:
    """The rate of the step that takes samples `samples_seen ... samples_seen + global_batch_size - 1`.

    During warm-up the rate rises linearly with the samples seen after the step, so that the first step is never
    at the full rate and the first one past the warm-up is. `step` (He et al. 2016) multiplies by `gamma` at each
    milestone; `cosine` (Loshchilov & Hutter 2017, without restarts) falls to zero at the end of the run.
    """
    warmup = schedule.warmup_epochs * derived.train_samples
    if samples_seen < warmup:
        return optim.lr * min(1.0, (samples_seen + derived.global_batch_size) / warmup)
    if schedule.name == "step":
        passed = sum(samples_seen >= m * derived.train_samples for m in schedule.milestones)
        return optim.lr * schedule.gamma**passed
    progress = (samples_seen - warmup) / (derived.total_samples - warmup)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
