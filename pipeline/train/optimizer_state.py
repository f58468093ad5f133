"""The optimizer's state as whole tensors under the parameters' names, whatever ZeRO stage or number of ranks holds it.

DeepSpeed's own files can only be read at the same stage and number of ranks, and its universal checkpoint knows Adam
alone. Here the ranks' parts are put together when a checkpoint is written, and cut anew when it is read. The names are
`state/KEY/PARAMETER`, and `group/KEY` for what torch keeps in its parameter groups (LAMB's step).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_GROUP_KEYS = ("step",)


def gather(optimizer: Any, module: nn.Module, stage: int) -> dict[str, torch.Tensor]:
    """The whole state on the CPU (a collective); empty on every rank but 0.

    Args:
        optimizer: What `deepspeed.initialize` returned.
        module: The model that it trains.
        stage: ZeRO's.
    """
    first = dist.get_rank() == 0
    if stage in (1, 2):
        _link(optimizer)
    whole: dict[str, torch.Tensor] = {}
    for name, parameter in _trained(module):
        for key, value in _entries(optimizer, stage, parameter):
            if first:
                whole[f"state/{key}/{name}"] = value.detach().to("cpu", copy=True).contiguous()
    if first:
        group = optimizer.param_groups[0]
        whole |= {f"group/{key}": torch.as_tensor(group[key]) for key in _GROUP_KEYS if key in group}
    return whole


def scatter(optimizer: Any, module: nn.Module, stage: int, whole: dict[str, torch.Tensor]) -> None:
    """Gives this rank its part of what `gather` returned; no collective."""
    saved: dict[str, dict[str, torch.Tensor]] = {}  # by parameter and key
    for name, value in whole.items():
        kind, key, *rest = name.split("/")
        if kind == "state":
            saved.setdefault(rest[0], {})[key] = value
    if stage > 0 and saved:
        _allocate(optimizer, stage, next(iter(saved.values())))
    for name, parameter in _trained(module):
        for key, value in saved.get(name, {}).items():
            if stage == 0:
                optimizer.state[parameter][key] = value.to(parameter.device if value.ndim else "cpu", copy=True)
            elif value.ndim:
                _cut(optimizer, stage, parameter, key, value)
    for group in optimizer.param_groups:
        for key in _GROUP_KEYS:
            entry = whole.get(f"group/{key}")
            if entry is not None:
                group[key] = entry.clone()


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _flat_parts(optimizer: Any, stage: int) -> list[torch.Tensor]:
    """What ZeRO lets this rank's optimizer step: parts of all weights of a group, one after the other."""
    return optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat


def _entries(optimizer: Any, stage: int, parameter: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter's whole state: tensors of its shape, and single numbers."""
    if stage == 0:
        yield from ((key, value) for key, value in optimizer.state[parameter].items() if torch.is_tensor(value))
        return
    part = _flat_parts(optimizer, stage)[0]
    for key, value in optimizer.optimizer.state[part].items():
        if torch.is_tensor(value) and value.ndim:
            whole = parameter.get_full_hp_param(key) if stage < 3 else optimizer.get_full_hp_param(parameter, key)
            yield key, whole
        elif torch.is_tensor(value):
            yield key, value


def _allocate(optimizer: Any, stage: int, like: dict[str, torch.Tensor]) -> None:
    """Makes the state of ZeRO's flat parts, which comes with the first step otherwise."""
    for part in _flat_parts(optimizer, stage):
        for key, value in like.items():
            optimizer.optimizer.state[part][key] = torch.zeros_like(part) if value.ndim else value.clone()
    if stage < 3:
        _link(optimizer)


def _link(optimizer: Any) -> None:
    """Makes ZeRO 1 and 2 look at the optimizer's state as it is: their first look came before SGD's first step."""
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _cut(optimizer: Any, stage: int, parameter: Any, key: str, value: torch.Tensor) -> None:
    """Copies this rank's part of a whole tensor to its place."""
    if stage < 3:
        parameter.set_full_hp_param(value, key)
        return
    part, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    start = part.numel() * optimizer._get_param_partition_rank(parameter)
    mine = value.flatten()[start : start + part.numel()]  # the last rank's part is padded
    part.zero_()[: mine.numel()].copy_(mine)
