"""The thread that brings a journal's records to a sink, in order, until it has taken them."""

import threading
from collections.abc import Callable

from pipeline.extension_points import Sink
from pipeline.tracking.journal import Journal

_RETRY_S = (0.5, 1, 2, 5, 10)
_TOLD_AFTER = 3  # failures in a row


class Sender:
    """Sends what a journal holds after the place `sent`, and what is added while it runs.

    Args:
        journal: Where records are; who adds one notifies `change`.
        change: Guards the journal, and wakes the thread.
        sink: Takes the records. What it does not take it gets again, after a wait.
        sent: The place in the journal up to which it has them.
        save: Is told each new place, so that a restart goes on there.
        failure: Says in words what an error of the sink means, for `told`, which hears of it after some tries.
    """

    def __init__(
        self,
        journal: Journal,
        change: threading.Condition,
        sink: Sink,
        sent: int,
        save: Callable[[int], None],
        failure: Callable[[Exception], str],
        told: Callable[[str], None],
    ) -> None:
        self._journal, self._change, self._sink = journal, change, sink
        self._sent, self._save, self._failure, self._told = min(sent, journal.size), save, failure, told
        self._closing, self._give_up = False, threading.Event()
        self._thread = threading.Thread(target=self._send, name="tracker", daemon=True)
        self._thread.start()

    def flush(self, timeout_s: float) -> bool:
        """Waits until the sink has all records, and says whether it has."""
        with self._change:
            return self._change.wait_for(lambda: self._sent >= self._journal.size, timeout_s)

    def close(self, timeout_s: float) -> int:
        """Sends what is left; returns how many records the sink did not take in time."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join(timeout_s)
        self._give_up.set()
        return sum(1 for _ in self._journal.records(self._sent))

    def _send(self) -> None:
        failures = 0
        while True:
            with self._change:
                self._change.wait_for(lambda: self._sent < self._journal.size or self._closing)
                if self._sent >= self._journal.size:
                    return
                records, end = self._journal.read(self._sent)
            try:
                self._sink.deliver(records)
            except Exception as error:  # each kind of store has errors of its own, and the next try may succeed
                failures += 1
                if failures == _TOLD_AFTER:
                    self._told(f"{self._failure(error)}; they are kept in {self._journal.file}, and it is tried again")
                if self._give_up.wait(_RETRY_S[min(failures, len(_RETRY_S)) - 1]):
                    return
                continue
            failures = 0
            with self._change:
                self._sent = end
                self._save(end)
                self._change.notify_all()
