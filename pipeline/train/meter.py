"""Loss and speed between two log lines, without touching the device in between."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from pipeline.derived import Derived


class Meter:
    """Sums losses on the device and times on the host, and reads both at the log interval."""

    def __init__(self, derived: Derived, device: torch.device) -> None:
        self._derived = derived
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)  # the sum, and of how many micro-batches
        self._images, self._seconds = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Starts the interval anew; also called after an evaluation, whose time is not training time."""
        self._loss.zero_()
        self._micro_batches = 0
        self._waited_s = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        started = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started

    def add(self, loss: torch.Tensor) -> None:
        """Counts a micro-batch's loss; one that is no number, whose step is left out, has no part in the mean."""
        finite = torch.isfinite(loss.detach())
        self._loss += torch.stack([torch.where(finite, loss.detach(), 0), finite])
        self._micro_batches += 1

    def _mean_loss(self) -> float:
        """The mean loss over all ranks since the interval began (a collective); waits for the device."""
        sums = self._loss.clone()
        dist.all_reduce(sums)
        total, count = sums.tolist()
        return total / max(1, count)

    def read(self, step: int, wishes: Sequence[bool] = ()) -> tuple[dict[str, float], list[bool]]:
        """Closes the interval (a collective): the mean loss over all ranks, images/s, data wait share, seconds left.

        `data_wait` is the largest share over the ranks, in [0, 1]: the slowest rank holds up all of them. Each of the
        `wishes` comes back true on all ranks where it was true on any.
        """
        loss = self._mean_loss()  # waits for the device, so the elapsed time includes all the work
        elapsed_s = time.perf_counter() - self._started
        largest = torch.tensor([self._waited_s / elapsed_s, *map(float, wishes)], device=self._loss.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        wait, *agreed = largest.tolist()
        steps = self._micro_batches // self._derived.accumulation
        images = steps * self._derived.global_batch_size
        self._images += images
        self._seconds += elapsed_s
        img_per_s = images / elapsed_s
        record = {
            "loss": loss,
            "img_per_s": img_per_s,
            "img_per_s_worker": img_per_s / self._derived.workers,
            "data_wait": wait,
            "eta_s": (self._derived.total_steps - step) * elapsed_s / steps,
        }
        self.restart()
        return record, [wish > 0 for wish in agreed]

    def mean_img_per_s(self) -> float:
        """Images per second over all closed intervals and all workers."""
        return self._images / self._seconds
