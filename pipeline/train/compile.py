"""torch.compile for a model, tried out before training begins."""

from collections.abc import Callable

import torch
from torch import nn

from pipeline.errors import UserError


def compile_model(model: nn.Module, example_NCHW: torch.Tensor, warn: Callable[[str], None] | None) -> None:
    """Compiles a model in place, its names kept, and compiles its forward and backward pass for the example.

    Where that fails, the model stays as it was if there is `warn`, which is told why. Buffers are left unchanged.

    Raises:
        UserError: it failed and there is no `warn`.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.forward = torch.compile(model.forward)  # not the whole call: DeepSpeed's hooks stay outside
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        torch.autograd.grad(model(example_NCHW).float().sum(), trained)
    except Exception as error:  # compilers fail in many ways
        del model.forward
        reason = f"torch.compile failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        if warn is None:
            raise UserError(
                f"{reason}. Set engine.compile=off, or engine.compile=try to go on without it where it fails."
            ) from error
        warn(f"{reason}; the model runs uncompiled")
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
