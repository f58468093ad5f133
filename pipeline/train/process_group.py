"""torch.distributed process groups outside Ray: for `pipeline.fit`, self-tests, tests and benchmarks."""

import atexit
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.errors import UserError

ENV_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_single_process_env: dict[str, str] = {}  # the variables of this process's own group, once it exists


@contextmanager
def process_group(store: Path, rank: int = 0, workers: int = 1, backend: str = "gloo") -> Iterator[None]:
    """Joins a process group on this machine through the file `store`, and destroys it at the end.

    Also sets the environment variables that DeepSpeed reads. DeepSpeed caches its groups, so a process can have only
    one.
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


@contextmanager
def single_process_group(device: torch.device) -> Iterator[None]:
    """Provides a process group of one rank in any program, such as a notebook.

    Restores the environment variables and the number of threads afterwards. The group itself lives until the process
    ends, because DeepSpeed caches its groups.

    Raises:
        UserError: the process is already one of several ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"pipeline.fit trains in one process, and this one is rank {dist.get_rank()} of {dist.get_world_size()}: "
            f"call it without torchrun, or train with `densenet train`, which starts its workers itself."
        )
    before, threads = {name: os.environ.get(name) for name in ENV_VARIABLES}, torch.get_num_threads()
    try:
        if not dist.is_initialized():
            _init_single_process("nccl" if device.type == "cuda" else "gloo")
        os.environ.update(_single_process_env)
        yield
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _init_single_process(backend: str) -> None:
    stack = ExitStack()
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="densenet"))
    stack.enter_context(process_group(Path(folder) / "store", backend=backend))
    atexit.register(stack.close)
    _single_process_env.update({name: os.environ[name] for name in ENV_VARIABLES})
