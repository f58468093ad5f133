"""A process that trains by itself: a process group of one rank, in whatever program it runs, a notebook too."""

import atexit
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.train.group import VARIABLES, process_group

_kept: dict[str, str] = {}  # the variables of this process's group, while there is one


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """Is in a group of this process alone while the block runs, and leaves variables and threads as they were.

    The group itself stays to the end of the process: DeepSpeed remembers its groups.

    Raises:
        UserError: the process is one of several ranks already.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"pipeline.fit trains in one process, and this one is rank {dist.get_rank()} of {dist.get_world_size()}: "
            f"call it without torchrun, or train with `densenet train`, which starts its workers itself."
        )
    before, threads = {name: os.environ.get(name) for name in VARIABLES}, torch.get_num_threads()
    try:
        if not dist.is_initialized():
            _join("nccl" if device.type == "cuda" else "gloo")
        os.environ.update(_kept)
        yield
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _join(backend: str) -> None:
    stack = ExitStack()
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="densenet"))
    stack.enter_context(process_group(Path(folder) / "store", backend=backend))
    atexit.register(stack.close)
    _kept.update({name: os.environ[name] for name in VARIABLES})
