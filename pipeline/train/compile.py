"""torch.compile for a model, before training begins."""

from collections.abc import Callable

import torch
from torch import nn

from pipeline.errors import UserError


def compile_model(model: nn.Module, example_NCHW: torch.Tensor, warn: Callable[[str], None] | None) -> None:
    """Compiles a model's forward and backward pass in place, for inputs like the example.

    Parameter names and buffers do not change. Where compilation fails, the model stays uncompiled and `warn` gets the
    reason.

    Raises:
        UserError: compilation failed and `warn` is None.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.forward = torch.compile(model.forward)  # not the whole module: DeepSpeed's hooks stay outside the graph
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        torch.autograd.grad(model(example_NCHW).float().sum(), trainable)
    except Exception as error:  # compilers fail in many ways
        del model.forward
        reason = f"torch.compile failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        if warn is None:
            raise UserError(
                f"{reason}. Set engine.compile=off, or engine.compile=try to train uncompiled where compilation fails."
            ) from error
        warn(f"{reason}; the model runs uncompiled")
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
