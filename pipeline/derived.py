"""Values derived from config, data and workers: batch sizes, gradient accumulation, steps, the scaled learning rate."""

import math
from typing import Literal

from pipeline.config import RunConfig
from pipeline.config_fields import Count, Device, Precision, Section
from pipeline.errors import ConfigError


class Derived(Section):
    """Values computed from config, data and workers; logged with the run, never set by the user.

    `global_batch_size = device_batch_size * gradient_accumulation_steps * workers` always holds.
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
    gradient_accumulation_steps: Count
    eval_batch_size: Count
    total_steps: Count
    total_samples: Count
    peak_lr: float

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step over all workers."""
        return self.device_batch_size * self.gradient_accumulation_steps * self.workers

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per pass over the training split; seldom a whole number."""
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

    The sample order has no gaps between epochs, so a batch may span the end of one epoch and the start of the next;
    the last step is the first one that completes `train.epochs` passes.

    Raises:
        ConfigError: the global batch cannot be split evenly, or the data set is smaller than one batch or has more
            classes than the model.
    """
    batch = config.train.global_batch_size
    logits = config.model.num_classes or num_classes
    if logits < num_classes:
        raise ConfigError(
            f"model.num_classes={logits} is less than the {num_classes} classes in data.root: set it to {num_classes} "
            f"or more, or omit it."
        )
    if batch > train_samples:
        raise ConfigError(
            f"train.global_batch_size={batch} is more than the {train_samples} training images in data.root: "
            f"set train.global_batch_size to {train_samples} or less."
        )
    device_batch, accumulation_steps = split_batch(config, workers)
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
        gradient_accumulation_steps=accumulation_steps,
        eval_batch_size=eval_batch,
        total_steps=total_steps,
        total_samples=total_steps * batch,
        peak_lr=config.optim.peak_lr(batch),
    )


def _zero_stage(config: RunConfig) -> Literal[0, 1, 2, 3]:
    """Chooses stage 0: a DenseNet has little optimizer state to shard (33 million numbers at most).

    On an H200, stage 1 had 0.73 of stage 0's throughput (DenseNet-121, 256 images, bf16): the GPU waited for the host.
    """
    if config.engine.zero_stage != "auto":
        return config.engine.zero_stage
    return 1 if config.engine.offload_optimizer else 0


def derive_for_workers(derived: Derived, config: RunConfig, workers: int) -> Derived:
    """Derives the values again for another number of workers."""
    same = ("cpus_per_worker", "device", "train_samples", "val_samples", "num_classes")
    return derive(config, workers=workers, **{name: getattr(derived, name) for name in same})


def split_batch(config: RunConfig, workers: int) -> tuple[int, int]:
    """Returns the largest allowed micro-batch per device, equal on all devices, and the gradient accumulation steps.

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
    divisor = _batch_divisor(config)
    most = config.train.max_device_batch_size
    steps = [n for n in range(1, per_worker + 1) if per_worker % (n * divisor) == 0 and per_worker // n <= most]
    if not steps:
        raise ConfigError(
            f"augment.mixup_alpha and augment.cutmix_alpha mix pairs of images, so each of the {workers} workers "
            f"needs an even micro-batch: train.global_batch_size={batch} gives {per_worker} images per worker and "
            f"step, at most train.max_device_batch_size={most} at once. Set train.global_batch_size to a multiple of "
            f"{2 * workers}, and train.max_device_batch_size to 2 or more."
        )
    return per_worker // steps[0], steps[0]


def halve_device_batch(derived: Derived, config: RunConfig) -> Derived | None:
    """Halves the micro-batch, or takes the next smaller that divides the same global batch; None if there is none."""
    batch, per_worker = derived.device_batch_size, derived.device_batch_size * derived.gradient_accumulation_steps
    divisor = _batch_divisor(config)
    smaller = next((b for b in range(batch // 2, 0, -1) if b % divisor == 0 and per_worker % b == 0), None)
    if smaller is None:
        return None
    eval_batch = smaller if config.eval.batch_size == "auto" else derived.eval_batch_size
    sizes = {
        "device_batch_size": smaller,
        "gradient_accumulation_steps": per_worker // smaller,
        "eval_batch_size": eval_batch,
    }
    return derived.model_copy(update=sizes)


def _batch_divisor(config: RunConfig) -> int:
    """Returns 2 if mixup or CutMix mix pairs of images, which a micro-batch must not split, else 1."""
    return 2 if config.augment.mixes_images else 1
