"""Gathers and scatters the optimizer state as full tensors by parameter name, at any ZeRO stage and number of ranks.

DeepSpeed's own checkpoints load only at the same stage and number of ranks, and its universal checkpoint supports only
Adam. Here saving gathers the ranks' partitions, and loading partitions the state again. The names are
`state/KEY/PARAMETER`, and `group/KEY` for state in torch's parameter groups (LAMB's step).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_GROUP_KEYS = ("step",)


def gather(optimizer: Any, module: nn.Module, stage: int) -> dict[str, torch.Tensor]:
    """Returns the full state on the CPU (a collective); empty on every rank but 0.

    Args:
        optimizer: The optimizer that `deepspeed.initialize` returned.
        module: The model that it trains.
        stage: The ZeRO stage.
    """
    is_rank0 = dist.get_rank() == 0
    if stage in (1, 2):
        _relink_state(optimizer)
    full: dict[str, torch.Tensor] = {}
    for name, parameter in _trainable(module):
        for key, value in _full_entries(optimizer, stage, parameter):
            if is_rank0:
                full[f"state/{key}/{name}"] = value.detach().to("cpu", copy=True).contiguous()
    if is_rank0:
        group = optimizer.param_groups[0]
        full |= {f"group/{key}": torch.as_tensor(group[key]) for key in _GROUP_KEYS if key in group}
    return full


def scatter(optimizer: Any, module: nn.Module, stage: int, full: dict[str, torch.Tensor]) -> None:
    """Loads this rank's partition of a full state from `gather`; not a collective."""
    saved: dict[str, dict[str, torch.Tensor]] = {}  # by parameter name, then by key
    for name, value in full.items():
        kind, key, *rest = name.split("/")
        if kind == "state":
            saved.setdefault(rest[0], {})[key] = value
    if stage > 0 and saved:
        _allocate_state(optimizer, stage, next(iter(saved.values())))
    for name, parameter in _trainable(module):
        for key, value in saved.get(name, {}).items():
            if stage == 0:
                optimizer.state[parameter][key] = value.to(parameter.device if value.ndim else "cpu", copy=True)
            elif value.ndim:
                _copy_partition(optimizer, stage, parameter, key, value)
    for group in optimizer.param_groups:
        for key in _GROUP_KEYS:
            entry = full.get(f"group/{key}")
            if entry is not None:
                group[key] = entry.clone()


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _flat_partitions(optimizer: Any, stage: int) -> list[torch.Tensor]:
    """Returns the flat fp32 partitions, one per parameter group, that this rank's optimizer updates under ZeRO."""
    return optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat


def _full_entries(optimizer: Any, stage: int, parameter: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a parameter's full state: tensors of its shape, and scalars."""
    if stage == 0:
        yield from ((key, value) for key, value in optimizer.state[parameter].items() if torch.is_tensor(value))
        return
    part = _flat_partitions(optimizer, stage)[0]
    for key, value in optimizer.optimizer.state[part].items():
        if torch.is_tensor(value) and value.ndim:
            full = parameter.get_full_hp_param(key) if stage < 3 else optimizer.get_full_hp_param(parameter, key)
            yield key, full
        elif torch.is_tensor(value):
            yield key, value


def _allocate_state(optimizer: Any, stage: int, like: dict[str, torch.Tensor]) -> None:
    """Allocates the state of ZeRO's flat partitions, which otherwise happens at the first step."""
    for part in _flat_partitions(optimizer, stage):
        for key, value in like.items():
            optimizer.optimizer.state[part][key] = torch.zeros_like(part) if value.ndim else value.clone()
    if stage < 3:
        _relink_state(optimizer)


def _relink_state(optimizer: Any) -> None:
    """Links ZeRO 1 and 2 to the optimizer's current state: they link it before SGD's first step creates it."""
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _copy_partition(optimizer: Any, stage: int, parameter: Any, key: str, value: torch.Tensor) -> None:
    """Copies this rank's partition of a full tensor into the optimizer's state."""
    if stage < 3:
        parameter.set_full_hp_param(value, key)
        return
    part, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    start = part.numel() * optimizer._get_param_partition_rank(parameter)
    own = value.flatten()[start : start + part.numel()]  # the last rank's partition is padded
    part.zero_()[: own.numel()].copy_(own)
