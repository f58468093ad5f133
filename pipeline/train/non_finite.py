"""Detects a NaN or infinite loss on any rank before the optimizer steps, without stalling the device."""

import torch
import torch.distributed as dist


class NonFiniteLossDetector:
    """Collects the micro-batches' losses of a step on the device, and exchanges the result between the ranks.

    The losses are known after the forward pass. Call `start_exchange` between the last forward and the last backward
    pass of a step: the collective then overlaps with the backward pass. Call `bad_ranks` after launching the backward
    pass: it waits only for the forward pass, so the device always has work queued.
    """

    def __init__(self, device: torch.device) -> None:
        workers = dist.get_world_size()
        self._rank = dist.get_rank()
        self._bad_R = torch.zeros(workers, dtype=torch.int32, device=device)
        self._bad_cpu_R = torch.zeros(workers, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._work: dist.Work | None = None

    def add(self, loss: torch.Tensor) -> None:
        """Adds a micro-batch's loss."""
        self._bad_R[self._rank] += ~torch.isfinite(loss.detach())

    def start_exchange(self) -> None:
        """Starts the all-reduce of the result (a collective)."""
        self._work = dist.all_reduce(self._bad_R, async_op=True)

    def bad_ranks(self) -> list[int]:
        """Returns the ranks on which a loss of the step is NaN or infinite, and begins the next step."""
        assert self._work is not None
        if self._stream is None:
            self._work.wait()
            self._bad_cpu_R.copy_(self._bad_R)
        else:
            with torch.cuda.stream(self._stream):  # the device's main stream does not wait for the copy
                self._work.wait()
                self._bad_cpu_R.copy_(self._bad_R, non_blocking=True)
            self._stream.synchronize()
        self._bad_R = torch.zeros_like(self._bad_R)
        self._work = None
        return self._bad_cpu_R.nonzero().flatten().tolist()
