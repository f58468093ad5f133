"""What is known of a step whose loss is NaN or infinite, as one JSON file for people."""

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
    """Looks at one more forward pass, and lets rank 0 write what all ranks found (a collective).

    Args:
        file: Where to.
        step: What is the same on all ranks: the step's number, the rate, non_finite_weights weights, ...
        samples: This rank's images in the step.
        losses: This rank's losses until then, oldest first; the last ones are the step's.
        module: The model before the step.
        forward: Runs the model on the step's last micro-batch.
    """
    largest = _largest_outputs(module, forward)
    found: list[Any] = [None] * dist.get_world_size()
    mine = {
        "losses": [_number(loss.item()) for loss in losses],
        "first_layer": next((name for name, value in largest.items() if not math.isfinite(value)), None),
        "largest_outputs": {name: _number(value) for name, value in largest.items()},
        "samples": samples,
    }
    dist.all_gather_object(found, mine)
    if dist.get_rank() == 0:
        ranks = [{"rank": rank} | of_rank for rank, of_rank in enumerate(found)]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, step | {"ranks": ranks})


@torch.no_grad()
def _largest_outputs(module: nn.Module, forward: Callable[[], object]) -> dict[str, float]:
    """The largest absolute output of each layer in one forward pass, in the order of the layers; NaN where one is."""
    largest: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in module.named_modules():
        if not list(layer.children()):

            def look(layer: nn.Module, inputs: object, output: object, name: str = name) -> None:
                if isinstance(output, torch.Tensor):
                    largest[name] = output.detach().abs().amax()

            hooks.append(layer.register_forward_hook(look))
    try:
        with torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value.item() for name, value in largest.items()}


def _number(value: float) -> float | str:
    """JSON knows no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
