"""The optimizer and its parameter groups."""

from collections.abc import Mapping

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from pipeline.config import Optim
from pipeline.extension_points import OPTIMIZERS

_DECAYED = (nn.Conv2d, nn.Linear)
_FUSED = ("momentum", "adamw")
_NO_FACTORS: Mapping[str, float] = {}


def parameter_groups(model: nn.Module, weight_decay: float, factors: Mapping[str, float] = _NO_FACTORS) -> list[dict]:
    """The trainable parameters: weights of convolutions and linear layers, and the rest, without weight decay.

    The choice goes by the type of the owning module: DenseNet's norms have names like `norm5`, `norm0`, and a
    rule on names would miss them. Parameters with other `factors` (by name; 1 by default) are in other groups; the
    factor is the group's `lr_scale`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decay = weight_decay if isinstance(module, _DECAYED) and name == "weight" else 0.0
                factor = factors.get(f"{prefix}.{name}" if prefix else name, 1.0)
                groups.setdefault((decay, factor), []).append(parameter)
    return [{"params": p, "weight_decay": decay, "lr_scale": factor} for (decay, factor), p in groups.items()]


def create_optimizer(groups: list[dict], optim: Optim, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer by its name; the loop sets the learning rate before every step.

    SGD (without dampening), LARS and Muon take Nesterov's look-ahead where it is asked for. LAMB's own clipping is
    off: `optim.clip_grad_norm` is the only one. `fused` asks for PyTorch's one kernel a
    step, where it has one (SGD, AdamW).
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
