"""Loss, throughput and stragglers between two log lines, without synchronizing the device in between."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from pipeline.derived import Derived

SLOW_RATIO = 1.2


@dataclass(frozen=True)
class IntervalMetrics:
    """The metrics between two log lines, over all ranks.

    Attributes:
        loss: The mean loss; None if no step of the interval counts.
        skipped_steps: Steps that did not change the weights since the last log line.
        all_skipped: Whether no step changed the weights since the last log line or evaluation.
        img_per_s: Images per second over all workers.
        img_per_s_worker: Images per second and worker.
        step_s: Seconds per optimizer step.
        data_wait: Fraction of the time waiting for data, in [0, 1], on the slowest rank, which holds up all others.
        eta_s: Seconds left in training.
        stragglers: The slow ranks.
    """

    loss: float | None
    skipped_steps: int
    all_skipped: bool
    img_per_s: float
    img_per_s_worker: float
    step_s: float
    data_wait: float
    eta_s: float
    stragglers: "Stragglers"


class Meter:
    """Sums up losses on the device and times on the host, and reads both at the log interval.

    `warn` reports stragglers. Creating a meter is a collective.
    """

    def __init__(self, derived: Derived, device: torch.device, warn: Callable[[str], None]) -> None:
        self._derived, self._stragglers = derived, StragglerDetector(derived.workers, warn)
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of micro-batches
        self._step_loss = torch.zeros_like(self._loss)
        self._skipped = 0  # steps since the last log line
        self._images, self._seconds = 0, 0.0
        self.reset()

    def reset(self) -> None:
        """Starts a new interval; also call it after an evaluation, whose time is not training time."""
        self._loss.zero_()
        self._step_loss.zero_()
        self._micro_batches = self._applied = 0
        self._waited_s = 0.0
        self._marks: list[tuple[Any, Any]] = []
        self._started = time.perf_counter()

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Counts the time of the `with` block as waiting for data."""
        started = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started

    def begin_step(self) -> None:
        """Marks the start of a step."""
        self._marks.append((self._now(), None))

    def end_forward(self) -> None:
        """Marks the end of the step's last forward pass, until which ranks do not wait for each other."""
        self._marks[-1] = (self._marks[-1][0], self._now())

    def _now(self) -> Any:
        if self._loss.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _own_s(self) -> float:
        """Returns this rank's seconds before it waits for others, in this interval; the device must be idle."""
        if self._loss.device.type != "cuda":
            return sum(end - start for start, end in self._marks)
        return sum(start.elapsed_time(end) for start, end in self._marks) / 1000

    def add_loss(self, loss: torch.Tensor) -> None:
        """Adds a micro-batch's loss to the current step."""
        self._step_loss += torch.stack([loss.detach(), torch.ones_like(loss)])
        self._micro_batches += 1

    def end_step(self, applied: bool) -> None:
        """Ends a step; `applied` is false where fp16 gradients overflowed."""
        self._loss += self._step_loss
        self._step_loss.zero_()
        self._applied += applied
        self._skipped += not applied

    def skip_step(self) -> None:
        """Ends a step with a NaN or infinite loss on any rank; the mean loss ignores the step."""
        self._step_loss.zero_()
        self._skipped += 1

    def _mean_loss(self) -> float | None:
        """Returns the mean loss over all ranks in this interval (a collective), or None; waits for the device."""
        sums = self._loss.clone()
        dist.all_reduce(sums)
        total, count = sums.tolist()
        return total / count if count else None

    def read(self, step: int, flags: Sequence[bool] = ()) -> tuple[IntervalMetrics, list[bool]]:
        """Returns the metrics of the interval, and begins the next one (a collective).

        Each of the `flags` is returned as true on all ranks if it is true on any rank. `step` counts from 1.
        """
        loss = self._mean_loss()  # waits for the device, so the elapsed time includes all the work
        elapsed_s = time.perf_counter() - self._started
        own_R = torch.zeros(self._derived.workers, device=self._loss.device)
        own_R[dist.get_rank()] = self._own_s()
        dist.all_reduce(own_R)
        stragglers = self._stragglers.update(own_R.tolist())
        largest = torch.tensor([self._waited_s / elapsed_s, *map(float, flags)], device=self._loss.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        data_wait, *agreed = largest.tolist()
        steps = self._micro_batches // self._derived.gradient_accumulation_steps
        images = steps * self._derived.global_batch_size
        self._images += images
        self._seconds += elapsed_s
        img_per_s = images / elapsed_s
        metrics = IntervalMetrics(
            loss=loss,
            skipped_steps=self._skipped,
            all_skipped=self._applied == 0,
            img_per_s=img_per_s,
            img_per_s_worker=img_per_s / self._derived.workers,
            step_s=elapsed_s / steps,
            data_wait=data_wait,
            eta_s=(self._derived.total_steps - step) * elapsed_s / steps,
            stragglers=stragglers,
        )
        self.reset()
        self._skipped = 0
        return metrics, [flag > 0 for flag in agreed]

    def mean_img_per_s(self) -> float:
        """Returns images per second over all finished intervals and all workers."""
        return self._images / self._seconds


@dataclass(frozen=True)
class Stragglers:
    """The slow ranks of an interval.

    Attributes:
        slow_ranks: How many ranks were slow in this interval and the one before.
        slowest_rank: The rank that took longest until the end of its forward passes.
        slowest_rank_ratio: Its time over the median rank's, at least 1.
    """

    slow_ranks: int
    slowest_rank: int
    slowest_rank_ratio: float


class StragglerDetector:
    """Warns once of a rank that is slow in two intervals in a row.

    A slow rank takes at least `SLOW_RATIO` times as long as the median rank until the end of its forward passes.
    Creating a detector is a collective: the ranks exchange their host names.
    """

    def __init__(self, workers: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._hosts = [""] * workers
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._slow: set[int] = set()
        self._reported: set[int] = set()

    def update(self, own_s: list[float]) -> Stragglers:
        """Takes each rank's seconds before it waits for others in this interval."""
        median_s = median(own_s)
        ratios = [spent_s / median_s if median_s > 0 else 1.0 for spent_s in own_s]
        slow = {rank for rank, ratio in enumerate(ratios) if ratio >= SLOW_RATIO}
        slow_twice = slow & self._slow
        for rank in sorted(slow_twice - self._reported):
            self._reported.add(rank)
            self._warn(
                f"rank {rank} on {self._hosts[rank]} is slow: its forward passes take {ratios[rank]:.1f} times as long "
                f"as the median rank's, and the other ranks wait for it"
            )
        self._slow = slow
        return Stragglers(len(slow_twice), ratios.index(max(ratios)), max(ratios))
