"""Writes a JSON file that helps to diagnose a NaN or infinite loss."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.train.checkpoint import write_json


def diagnose(
    file: Path,
    step: dict[str, Any],
    samples: list[str],
    losses: list[torch.Tensor],
    module: nn.Module,
    forward: Callable[[], object],
) -> None:
    """Runs one more forward pass, and writes the findings of all ranks to a file on rank 0 (a collective).

    Args:
        file: The JSON file to write.
        step: Entries that are the same on all ranks: step, epoch, learning rate, non-finite weights, ...
        samples: This rank's images in the step.
        losses: This rank's latest losses, oldest first; the last ones belong to the step.
        module: The model before the step.
        forward: Runs the model on the step's last micro-batch.
    """
    largest = _largest_outputs(module, forward)
    found: list[Any] = [None] * dist.get_world_size()
    own = {
        "losses": [_json_number(loss.item()) for loss in losses],
        "first_layer": next((name for name, value in largest.items() if not math.isfinite(value)), None),
        "largest_outputs": {name: _json_number(value) for name, value in largest.items()},
        "samples": samples,
    }
    dist.all_gather_object(found, own)
    if dist.get_rank() == 0:
        ranks = [{"rank": rank} | findings for rank, findings in enumerate(found)]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, step | {"ranks": ranks})


@torch.no_grad()
def _largest_outputs(module: nn.Module, forward: Callable[[], object]) -> dict[str, float]:
    """Returns the largest absolute output of each layer in one forward pass, in execution order; NaN if any is NaN."""
    largest: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in module.named_modules():
        if not list(layer.children()):

            def record(layer: nn.Module, inputs: object, output: object, name: str = name) -> None:
                if isinstance(output, torch.Tensor):
                    largest[name] = output.detach().abs().amax()

            hooks.append(layer.register_forward_hook(record))
    try:
        with torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value.item() for name, value in largest.items()}


def _json_number(value: float) -> float | str:
    """Converts NaN and infinities to strings, since JSON does not support them."""
    return value if math.isfinite(value) else str(value)
