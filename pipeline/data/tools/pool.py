"""A process pool with progress reports; its workers end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pipeline.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
OnProgress = Callable[[str, int, int], None]


class Pool:
    """A pool of `workers` processes, or the current process for 1; use as a context manager.

    `on_progress` is called with (description, completed size, total size) whenever a task ends.
    """

    def __init__(self, workers: int, on_progress: OnProgress = lambda description, done, total: None) -> None:
        self.workers = workers
        self._on_progress = on_progress
        self._executor = (
            ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), _init_worker)
            if workers > 1
            else None
        )
        self._earlier_children = set(multiprocessing.active_children())

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._executor is None:
            return
        if kind is not None:  # the results of running tasks are not needed
            for process in set(multiprocessing.active_children()) - self._earlier_children:
                process.kill()
        self._executor.shutdown(cancel_futures=True)

    def map(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        description: str,
        sizes: Sequence[int] | None = None,
        on_result: Callable[[Result], None] = lambda result: None,
    ) -> list[Result]:
        """Returns the results in the order of the tasks; calls `on_result` in this thread as each task completes.

        Args:
            function: The task's function; it must be picklable.
            tasks: One argument of `function` per task.
            description: Name of the work in progress reports.
            sizes: Size of each task for progress reports, in any unit; 1 each by default.
            on_result: Callback for each result.

        Raises:
            DataError: a worker process died; exceptions of tasks are raised unchanged.
        """
        sizes = sizes or [1] * len(tasks)
        total, done = sum(sizes), 0
        results: list[Any] = [None] * len(tasks)
        for i, result in self._completed(function, tasks):
            results[i] = result
            on_result(result)
            done += sizes[i]
            self._on_progress(description, done, total)
        return results

    def imap(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        description: str,
        sizes: Sequence[int] | None = None,
    ) -> Iterator[Result]:
        """As `map`, but yields the results one by one, so that they need not be in memory at the same time."""
        sizes = sizes or [1] * len(tasks)
        total, done = sum(sizes), 0
        for size, result in zip(sizes, self._in_order(function, tasks), strict=True):
            yield result
            done += size
            self._on_progress(description, done, total)

    def _in_order(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        if self._executor is None:
            yield from map(function, tasks)
            return
        futures = deque(self._executor.submit(function, task) for task in tasks)
        try:
            while futures:
                yield futures.popleft().result()
        except BrokenProcessPool as error:
            raise _worker_died() from error

    def _completed(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterable[tuple[int, Result]]:
        if self._executor is None:
            for i, task in enumerate(tasks):
                yield i, function(task)
            return
        futures = {self._executor.submit(function, task): i for i, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise _worker_died() from error


def _worker_died() -> DataError:
    return DataError(
        "a worker process died without an error; the system may have killed it for lack of memory. Repeat the command, "
        "with fewer --workers in that case: completed work is kept."
    )


def _init_worker() -> None:
    """Leaves Ctrl-C to the main process, and ends the worker when the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
