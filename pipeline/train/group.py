"""Process groups outside Ray, whose workers have one already: self-tests, tests and benchmarks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def process_group(store: Path, rank: int = 0, workers: int = 1, backend: str = "gloo") -> Iterator[None]:
    """Joins a group whose members on this machine find each other by the file `store`, and leaves it at the end.

    Also sets the variables that DeepSpeed reads; it remembers its groups, so a process has one at most.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    device = torch.device("cuda", rank) if backend == "nccl" else None
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=workers, device_id=device)
    try:
        yield
    finally:
        dist.destroy_process_group()
