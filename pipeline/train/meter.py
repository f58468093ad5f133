"""Loss and speed between two log lines, without touching the device in between."""

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

SLOW = 1.2


@dataclass(frozen=True)
class Reading:
    """What the meter knows of an interval, over all ranks.

    `skipped_steps` counts the steps that moved no weights, also before an evaluation; `all_skipped` says that all since
    then were such. The mean `loss` is None where no step has any. `data_wait` is the largest share over the ranks, in
    [0, 1]: the slowest rank holds up all of them. `eta_s` are the seconds left in training.
    """

    loss: float | None
    skipped_steps: int
    all_skipped: bool
    img_per_s: float
    img_per_s_worker: float
    step_s: float
    data_wait: float
    eta_s: float


class Meter:
    """Sums losses on the device and times on the host, and reads both at the log interval.

    `warn` is told of ranks that hold up the others. Making one is a collective.
    """

    def __init__(self, derived: Derived, device: torch.device, warn: Callable[[str], None]) -> None:
        self._derived, self._stragglers = derived, Stragglers(derived.workers, warn)
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)  # the sum, and of how many micro-batches
        self._of_step = torch.zeros_like(self._loss)
        self._skipped = 0  # steps since the last log line
        self._images, self._seconds = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Starts the interval anew; also called after an evaluation, whose time is not training time."""
        self._loss.zero_()
        self._of_step.zero_()
        self._micro_batches = self._applied = 0
        self._waited_s = 0.0
        self._marks: list[tuple[Any, Any]] = []
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        started = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started

    def begin(self) -> None:
        """A step begins."""
        self._marks.append((self._now(), None))

    def forwarded(self) -> None:
        """The step's last loss is known, or under way on the device: until here ranks need not wait for each other."""
        self._marks[-1] = (self._marks[-1][0], self._now())

    def _now(self) -> Any:
        if self._loss.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _own_s(self) -> float:
        """Seconds that this rank took by itself since the interval began; the device must be through with them."""
        if self._loss.device.type != "cuda":
            return sum(end - start for start, end in self._marks)
        return sum(start.elapsed_time(end) for start, end in self._marks) / 1000

    def add(self, loss: torch.Tensor) -> None:
        """Takes note of a micro-batch's loss, which `stepped` counts."""
        self._of_step += torch.stack([loss.detach(), torch.ones_like(loss)])
        self._micro_batches += 1

    def stepped(self, applied: bool) -> None:
        """A step ends; without being `applied` where fp16 gradients overflowed."""
        self._loss += self._of_step
        self._of_step.zero_()
        self._applied += applied
        self._skipped += not applied

    def skipped(self) -> None:
        """A step ends whose loss was not finite on some rank: none of its losses has a part in the mean."""
        self._of_step.zero_()
        self._skipped += 1

    def _mean_loss(self) -> float | None:
        """The mean loss over all ranks since the interval began (a collective), if any; waits for the device."""
        sums = self._loss.clone()
        dist.all_reduce(sums)
        total, count = sums.tolist()
        return total / count if count else None

    def read(self, step: int, wishes: Sequence[bool] = ()) -> tuple[Reading, list[bool]]:
        """Closes the interval, and begins the next one (a collective).

        Each of the `wishes` comes back true on all ranks where it was true on any.
        """
        loss = self._mean_loss()  # waits for the device, so the elapsed time includes all the work
        elapsed_s = time.perf_counter() - self._started
        own_R = torch.zeros(self._derived.workers, device=self._loss.device)
        own_R[dist.get_rank()] = self._own_s()
        dist.all_reduce(own_R)
        self._stragglers.look(own_R.tolist())
        largest = torch.tensor([self._waited_s / elapsed_s, *map(float, wishes)], device=self._loss.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        wait, *agreed = largest.tolist()
        steps = self._micro_batches // self._derived.gradient_accumulation_steps
        images = steps * self._derived.global_batch_size
        self._images += images
        self._seconds += elapsed_s
        img_per_s = images / elapsed_s
        reading = Reading(
            loss=loss,
            skipped_steps=self._skipped,
            all_skipped=self._applied == 0,
            img_per_s=img_per_s,
            img_per_s_worker=img_per_s / self._derived.workers,
            step_s=elapsed_s / steps,
            data_wait=wait,
            eta_s=(self._derived.total_steps - step) * elapsed_s / steps,
        )
        self.restart()
        self._skipped = 0
        return reading, [wish > 0 for wish in agreed]

    def mean_img_per_s(self) -> float:
        """Images per second over all closed intervals and all workers."""
        return self._images / self._seconds


class Stragglers:
    """Tells `warn` of a rank that holds up the others for the second time in a row, once.

    Such a rank takes `SLOW` times as long as the median rank, or longer, until its losses are known. Making one is a
    collective: the ranks tell each other their hosts.
    """

    def __init__(self, workers: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._hosts = [""] * workers
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._slow: set[int] = set()
        self._named: set[int] = set()

    def look(self, own_s: list[float]) -> None:
        """Takes the seconds that each rank took by itself."""
        usual_s = median(own_s)
        slow = {rank for rank, spent_s in enumerate(own_s) if usual_s > 0 and spent_s >= SLOW * usual_s}
        for rank in sorted((slow & self._slow) - self._named):
            self._named.add(rank)
            ratio = own_s[rank] / usual_s
            self._warn(
                f"rank {rank} on {self._hosts[rank]} is slow: it takes {ratio:.1f} times as long as the median "
                f"rank to its loss, and the others wait for it"
            )
        self._slow = slow
