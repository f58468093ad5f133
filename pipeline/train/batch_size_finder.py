"""Finds the largest micro-batch that fits into the device's memory before training (out-of-memory back-off)."""

from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist

from pipeline.config import RunConfig
from pipeline.derived import Derived, halve_device_batch
from pipeline.errors import UserError
from pipeline.model.densenet import create
from pipeline.train.engine import autocast

_EXTRA_COPIES = 6  # of the weights: ZeRO's fp32 partitions, a bucket, two optimizer moments, the EMA, slack


def find_batch_size(config: RunConfig, derived: Derived, device: torch.device, warn: Callable[[str], None]) -> Derived:
    """Halves the micro-batch per device until it fits, at the same global batch (a collective).

    Returns `derived` unchanged unless `train.on_out_of_memory` is `halve`. Each try is a forward and a backward pass
    of the model without DeepSpeed, so a rank that runs out of memory leaves no other rank in a collective. Gradient
    accumulation makes up for smaller micro-batches.

    Raises:
        UserError: not even the smallest micro-batch fits.
    """
    if config.train.on_out_of_memory != "halve":
        return derived
    tried = derived
    while not _fits_all(config, tried, device):
        smaller = halve_device_batch(tried, config)
        if smaller is None:
            raise UserError(f"{out_of_memory_message(tried, config)} No smaller batch is left to try.")
        tried = smaller
    if tried is not derived:
        warn(
            f"out of memory with micro-batches of {derived.device_batch_size} images: using "
            f"{tried.device_batch_size} per device and {tried.gradient_accumulation_steps} gradient accumulation "
            f"steps; the global batch stays {tried.global_batch_size}, batch norm's statistics are over "
            f"{tried.device_batch_size} images"
        )
    return tried


def out_of_memory_message(derived: Derived, config: RunConfig) -> str:
    """Returns the error message for CUDA out of memory, with settings that keep the global batch."""
    smaller = halve_device_batch(derived, config)
    advice = "set model.memory=activation-checkpointing"
    if smaller is not None:
        advice = (
            f"set train.max_device_batch_size={smaller.device_batch_size} (gradient accumulation steps become "
            f"{smaller.gradient_accumulation_steps}, the global batch stays {derived.global_batch_size}), or "
            f"train.on_out_of_memory=halve, or model.memory=activation-checkpointing"
        )
    return f"GPU out of memory with micro-batches of {derived.device_batch_size} images: {advice}."


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
    reserved = torch.empty(_EXTRA_COPIES * sum(p.numel() for p in model.parameters()), device=device)
    with autocast(derived, device):
        logits_NK = model(torch.zeros(shape_NCHW, device=device))
    logits_NK.float().sum().backward()
    del reserved
