"""Whether a step's loss is a number on every rank, known before the optimizer steps, at no cost to the device."""

import torch
import torch.distributed as dist


class FiniteLoss:
    """Collects the micro-batches' losses of a step on the device, and lets the ranks agree while it works on.

    WorkerFailureCallback are known after the forward pass. `ask`, called between the last forward and backward pass of a step, sends
    the ranks' answers round while the backward pass runs, so that `ranks`, called after it was launched, waits for no
    more than the forward pass, and the device always has work queued.
    """

    def __init__(self, device: torch.device) -> None:
        workers = dist.get_world_size()
        self._rank = dist.get_rank()
        self._wrong = torch.zeros(workers, dtype=torch.int32, device=device)
        self._answer = torch.zeros(workers, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._work: dist.Work | None = None

    def add(self, loss: torch.Tensor) -> None:
        """Takes note of a micro-batch's loss."""
        self._wrong[self._rank] += ~torch.isfinite(loss.detach())

    def ask(self) -> None:
        """Begins to exchange the answers (a collective)."""
        self._work = dist.all_reduce(self._wrong, async_op=True)

    def ranks(self) -> list[int]:
        """The ranks on which some loss of the step is no number; begins the next step."""
        assert self._work is not None
        if self._side is None:
            self._work.wait()
            self._answer.copy_(self._wrong)
        else:
            with torch.cuda.stream(self._side):  # the device's own stream does not wait for the copy
                self._work.wait()
                self._answer.copy_(self._wrong, non_blocking=True)
            self._side.synchronize()
        self._wrong = torch.zeros_like(self._wrong)
        self._work = None
        return self._answer.nonzero().flatten().tolist()
