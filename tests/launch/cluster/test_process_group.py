"""The process group of Ray Train's workers, without a GPU: the device of each worker."""

import os
from types import SimpleNamespace

import pytest
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from launch.cluster import process_group

_RANKS = {
    "get_world_rank": 3,
    "get_world_size": 4,
    "get_local_rank": 1,
    "get_local_world_size": 2,
    "get_node_rank": 1,
}
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")


@pytest.mark.parametrize(("backend", "device"), [("nccl", torch.device("cuda", 1)), ("gloo", None)])
def test_a_worker_joins_with_its_own_gpu_and_the_variables_of_torchrun(monkeypatch, backend, device):
    joined = {}
    context = SimpleNamespace(**{name: lambda value=value: value for name, value in _RANKS.items()})
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: joined.update(options, backend=name))
    for name in _VARIABLES:
        monkeypatch.setenv(name, "")  # restores them afterwards
    process_group._join(backend, "192.0.2.7", 2345)
    assert (joined["backend"], joined["device_id"]) == (backend, device)
    values = [os.environ[name] for name in _VARIABLES]
    assert values == ["192.0.2.7", "2345", "3", "4", "1", "2", "1"]
