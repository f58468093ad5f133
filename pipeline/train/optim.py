"""The optimizer and its parameter groups."""

import torch
from torch import nn

from pipeline.config import Optim

_DECAYED = (nn.Conv2d, nn.Linear)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: the weights of convolutions and linear layers, and everything else without weight decay.

    The choice goes by the type of the owning module: DenseNet's norms have names like `norm5`, `norm0`, and a
    rule on names would miss them.
    """
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (decayed if isinstance(module, _DECAYED) and name == "weight" else rest).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def create_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """SGD without dampening over `parameter_groups`; the loop sets the learning rate before every step."""
    nesterov = optim.nesterov and optim.momentum > 0
    groups = parameter_groups(model, optim.weight_decay)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=nesterov)
