"""What follows from a config, the data and the workers: batches, steps, the scaled learning rate."""

import math
from typing import Literal

from pipeline.config import Count, Device, Precision, RunConfig, Section
from pipeline.errors import ConfigError


class Derived(Section):
    """What follows from a config, the data and the workers; shown, saved, never chosen.

    `global_batch_size = device_batch_size * accumulation * workers` always holds.
    """

    workers: Count
    cpus_per_worker: Count
    device: Device
    precision: Precision
    zero_stage: Literal[0, 1, 2, 3]
    channels_last: bool
    train_samples: Count
    val_samples: Count
    num_classes: Count
    device_batch_size: Count
    accumulation: Count
    eval_batch_size: Count
    total_steps: Count
    total_samples: Count
    peak_lr: float

    @property
    def global_batch_size(self) -> int:
        """Samples in one optimizer step over all workers."""
        return self.device_batch_size * self.accumulation * self.workers

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which as many samples are seen as the split has; seldom a whole number."""
        return self.train_samples / self.global_batch_size


def derive(
    config: RunConfig,
    *,
    workers: int,
    cpus_per_worker: int,
    device: Device,
    train_samples: int,
    val_samples: int,
    num_classes: int,
) -> Derived:
    """Splits the global batch over the workers, counts the steps and scales the learning rate.

    The run's sample order has no gaps, so a batch may hold the end of one epoch and the start of the next;
    the last step is the first one that completes `train.epochs` passes.

    Raises:
        ConfigError: the global batch cannot be split evenly, the data set is smaller than one batch or has more
            classes than the model.
    """
    batch = config.train.global_batch_size
    logits = config.model.num_classes or num_classes
    if logits < num_classes:
        raise ConfigError(
            f"model.num_classes={logits} is less than the {num_classes} classes in data.root: set it to {num_classes} "
            f"or more, or leave it out."
        )
    if batch > train_samples:
        raise ConfigError(
            f"train.global_batch_size={batch} is more than the {train_samples} training images in data.root: "
            f"set train.global_batch_size to {train_samples} or less."
        )
    device_batch, accumulation = split_batch(config, workers)
    eval_batch = device_batch if config.eval.batch_size == "auto" else config.eval.batch_size
    total_steps = max(1, math.ceil(round(config.train.epochs * train_samples, 6) / batch))
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    return Derived(
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        device=device,
        precision=precision,
        zero_stage=_zero_stage(config),
        channels_last=device == "cuda" if config.engine.channels_last == "auto" else config.engine.channels_last,
        train_samples=train_samples,
        val_samples=val_samples,
        num_classes=logits,
        device_batch_size=device_batch,
        accumulation=accumulation,
        eval_batch_size=eval_batch,
        total_steps=total_steps,
        total_samples=total_steps * batch,
        peak_lr=config.optim.peak_lr(batch),
    )


def _zero_stage(config: RunConfig) -> Literal[0, 1, 2, 3]:
    """A DenseNet's optimizer has little to shard (33 million numbers at most), and stage 1 keeps the host busy.

    On an H200 it gave 0.73 of stage 0's rate (DenseNet-121, 256 images, bf16), since the device waited for the host.
    """
    if config.engine.zero_stage != "auto":
        return config.engine.zero_stage
    return 1 if config.engine.offload_optimizer else 0


def for_workers(derived: Derived, config: RunConfig, workers: int) -> Derived:
    """What follows for another number of workers."""
    same = ("cpus_per_worker", "device", "train_samples", "val_samples", "num_classes")
    return derive(config, workers=workers, **{name: getattr(derived, name) for name in same})


def split_batch(config: RunConfig, workers: int) -> tuple[int, int]:
    """Device batch and accumulation: the largest batch that a device may hold, the same for all.

    Raises:
        ConfigError: the global batch cannot be split evenly.
    """
    batch = config.train.global_batch_size
    if batch % workers:
        below, above = batch - batch % workers, batch + workers - batch % workers
        choices = " or ".join(str(b) for b in (below, above) if b > 0)
        raise ConfigError(
            f"train.global_batch_size={batch} cannot be divided among {workers} workers: set it to {choices}, "
            f"or change cluster.workers."
        )
    per_worker = batch // workers
    unit = _unit(config)
    most = config.train.max_device_batch_size
    accumulations = [a for a in range(1, per_worker + 1) if per_worker % (a * unit) == 0 and per_worker // a <= most]
    if not accumulations:
        raise ConfigError(
            f"augment.mixup_alpha and augment.cutmix_alpha mix pairs of images, so each of the {workers} workers needs an even "
            f"number of them at once: train.global_batch_size={batch} gives {per_worker} per worker and step, at most "
            f"train.max_device_batch_size={most} at once. Set train.global_batch_size to a multiple of {2 * workers}, "
            f"and train.max_device_batch_size to 2 or more."
        )
    return per_worker // accumulations[0], accumulations[0]


def halved(derived: Derived, config: RunConfig) -> Derived | None:
    """The same global batch in device batches of half the size or the next smaller one; None where there is none."""
    batch, total = derived.device_batch_size, derived.device_batch_size * derived.accumulation
    unit = _unit(config)
    smaller = next((b for b in range(batch // 2, 0, -1) if b % unit == 0 and total % b == 0), None)
    if smaller is None:
        return None
    evaluated = smaller if config.eval.batch_size == "auto" else derived.eval_batch_size
    sizes = {"device_batch_size": smaller, "accumulation": total // smaller, "eval_batch_size": evaluated}
    return derived.model_copy(update=sizes)


def _unit(config: RunConfig) -> int:
    """Images that must not be parted: they are mixed in pairs."""
    return 2 if config.augment.mixes else 1
