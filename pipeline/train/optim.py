"""The optimizer and its parameter groups."""

from collections.abc import Mapping

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from pipeline.config_train import Optim
from pipeline.extension_points import OPTIMIZERS

_DECAYED = (nn.Conv2d, nn.Linear)
_FUSED = ("momentum", "adamw")
_NO_LR_SCALES: Mapping[str, float] = {}


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] = _NO_LR_SCALES
) -> list[dict]:
    """Groups the trainable parameters: weight decay only for weights of convolutions and linear layers.

    The type of the owning module decides, because a rule on names would miss DenseNet's norms (`norm5`, `norm0`).
    `lr_scales` maps parameter names to learning rate multipliers (default 1), which become the groups' `lr_scale`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decay = weight_decay if isinstance(module, _DECAYED) and name == "weight" else 0.0
                lr_scale = lr_scales.get(f"{prefix}.{name}" if prefix else name, 1.0)
                groups.setdefault((decay, lr_scale), []).append(parameter)
    return [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in groups.items()]


def create_optimizer(groups: list[dict], optim: Optim, fused: bool = False) -> torch.optim.Optimizer:
    """Creates the optimizer `optim.name`; the training loop sets the learning rate before every step.

    SGD (without dampening), LARS and Muon use Nesterov momentum with `optim.nesterov`. LAMB's own gradient clipping is
    off: only `optim.clip_grad_norm` clips. `fused` selects PyTorch's fused kernels, where they exist (SGD, AdamW).
    """
    kind = OPTIMIZERS[optim.name]
    if kind.build is not None:
        return kind.build(groups, optim)
    options: dict[str, object] = {key: getattr(optim, key) for key in kind.reads}
    if "nesterov" in options:
        options["nesterov"] = optim.nesterov and optim.momentum > 0
    if optim.name == "lamb":
        options["max_grad_norm"] = None
    if fused and kind.timm in _FUSED:
        options["fused"] = True
    return create_optimizer_v2(groups, opt=kind.timm or optim.name, lr=optim.lr, **options)
