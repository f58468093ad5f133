"""Work shared out over processes, with progress, that ends with the process that asked for it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pipeline.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
OnProgress = Callable[[str, int, int], None]


class Pool:
    """`workers` processes, or this one alone for 1; use as a context manager.

    `on_progress` is told (what is done, weight that is done, weight in all) whenever a task ends.
    """

    def __init__(self, workers: int, on_progress: OnProgress = lambda what, done, total: None) -> None:
        self.workers = workers
        self._on_progress = on_progress
        self._executor = (
            ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), _in_worker) if workers > 1 else None
        )
        self._others = set(multiprocessing.active_children())

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._executor is None:
            return
        if kind is not None:  # what is being worked on will not be needed
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()
        self._executor.shutdown(cancel_futures=True)

    def map(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        what: str,
        weights: Sequence[int] | None = None,
        on_result: Callable[[Result], None] = lambda result: None,
    ) -> list[Result]:
        """Results in the order of the tasks; `on_result` gets each when it is there, in this thread.

        Raises:
            DataError: a process died; and whatever a task raises.
        """
        weights = weights or [1] * len(tasks)
        total, done = sum(weights), 0
        results: list[Any] = [None] * len(tasks)
        for i, result in self._finished(function, tasks):
            results[i] = result
            on_result(result)
            done += weights[i]
            self._on_progress(what, done, total)
        return results

    def _finished(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterable[tuple[int, Result]]:
        if self._executor is None:
            for i, task in enumerate(tasks):
                yield i, function(task)
            return
        futures = {self._executor.submit(function, task): i for i, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process ended without a word; the system may have killed it for memory. Start again, with "
                "fewer --workers if so: what was finished is kept."
            ) from error


def _in_worker() -> None:
    """Ctrl-C is the main process's to handle; when that one is gone, so is this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
