"""Finds the device batch that the device's memory holds, before training."""

from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist

from pipeline.config import RunConfig
from pipeline.derived import Derived, halve_device_batch
from pipeline.errors import UserError
from pipeline.model.densenet import create
from pipeline.train.engine import autocast

_COPIES = 6  # of the weights, besides weights and gradients: fp32 parts, a bucket, two moments, an average, slack


def find_batch_size(config: RunConfig, derived: Derived, device: torch.device, warn: Callable[[str], None]) -> Derived:
    """`derived`, or the same global batch in smaller device batches where it does not fit (a collective).

    Tries a forward and a backward pass of the bare model, which all ranks can fail at without waiting for each other;
    nothing where `train.on_out_of_memory` is not `halve`.

    Raises:
        UserError: no device batch fits.
    """
    if config.train.on_out_of_memory != "halve":
        return derived
    tried = derived
    while not _fits_all(config, tried, device):
        smaller = halve_device_batch(tried, config)
        if smaller is None:
            raise UserError(f"{too_large(tried, config)} No smaller batch is left to try.")
        tried = smaller
    if tried is not derived:
        warn(
            f"the memory does not hold {derived.device_batch_size} images at once: {tried.device_batch_size} are "
            f"taken, with {tried.gradient_accumulation_steps} accumulated; the global batch stays "
            f"{tried.global_batch_size}, batch norm's statistics are of {tried.device_batch_size}"
        )
    return tried


def too_large(derived: Derived, config: RunConfig) -> str:
    """What to do where the memory does not hold a batch, at the same global batch."""
    smaller = halve_device_batch(derived, config)
    advice = "set model.memory=activation-checkpointing"
    if smaller is not None:
        advice = (
            f"set train.max_device_batch_size={smaller.device_batch_size} (accumulation becomes "
            f"{smaller.gradient_accumulation_steps}, the global batch stays {derived.global_batch_size}), or "
            f"train.on_out_of_memory=halve, or model.memory=activation-checkpointing"
        )
    return f"the GPU's memory does not hold {derived.device_batch_size} images at once: {advice}."


def _fits_all(config: RunConfig, derived: Derived, device: torch.device) -> bool:
    fits = torch.zeros((), dtype=torch.int32, device=device)
    with suppress(torch.OutOfMemoryError):
        _try(config, derived, device)
        fits += 1
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dist.all_reduce(fits, dist.ReduceOp.MIN)
    return bool(fits.item())


def _try(config: RunConfig, derived: Derived, device: torch.device) -> None:
    model = create(config.model, derived.num_classes).to(device)
    side = config.data.max_image_size
    shape_NCHW = (derived.device_batch_size, config.model.in_chans, side, side)
    rest = torch.empty(_COPIES * sum(p.numel() for p in model.parameters()), device=device)
    with autocast(derived, device):
        logits_NK = model(torch.zeros(shape_NCHW, device=device))
    logits_NK.float().sum().backward()
    del rest
