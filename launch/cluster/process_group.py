"""The torch.distributed process group of Ray Train's workers.

Ray's own `TorchConfig` does the same, but makes the driver and Ray Train's controller import torch, which takes
seconds.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import ray
import ray.train
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

_TIMEOUT = timedelta(minutes=30)  # of a collective operation, as in Ray's TorchConfig
_SHUTDOWN_TIMEOUT_S = 30


@dataclass
class ProcessGroupConfig(BackendConfig):
    """The backend of the process group: `nccl` on GPUs, `gloo` on CPUs."""

    backend: Literal["nccl", "gloo"]

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that sets the workers up."""
        return _ProcessGroup


class _ProcessGroup(Backend):
    """Makes the workers join a process group before training, and leave it after."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, _free_address)
        ranks = range(len(worker_group))
        ray.get([worker_group.execute_single_async(r, _join, backend_config.backend, address, port) for r in ranks])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        try:
            ray.get(worker_group.execute_async(_leave), timeout=_SHUTDOWN_TIMEOUT_S)
        except GetTimeoutError:  # the workers' processes end in any case
            print(f"the process group did not end in {_SHUTDOWN_TIMEOUT_S} s")


def _free_address() -> tuple[str, int]:
    """Returns this node's address and a port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _join(backend: str, address: str, port: int) -> None:
    """Joins the process group, and sets the environment variables of torchrun, which DeepSpeed reads."""
    import torch.distributed as dist
    from ray.train.torch import get_device

    context = ray.train.get_context()
    variables = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "NODE_RANK": context.get_node_rank(),
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    device = get_device() if backend == "nccl" else None
    dist.init_process_group(backend, timeout=_TIMEOUT, device_id=device)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
