"""NCCL process groups, without a GPU: the device of each rank."""

import pytest
import torch
import torch.distributed as dist

from pipeline.train.process_group import process_group


@pytest.mark.parametrize(("backend", "device"), [("nccl", torch.device("cuda", 1)), ("gloo", None)])
def test_an_nccl_group_is_bound_to_the_ranks_gpu(monkeypatch, tmp_path, backend, device):
    joined = {}
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: joined.update(options, backend=name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restores them afterwards
    with process_group(tmp_path / "store", rank=1, workers=2, backend=backend):
        pass
    assert (joined["backend"], joined["device_id"], joined["rank"]) == (backend, device, 1)
