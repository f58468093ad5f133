"""The thread that sends a journal's records to a sink, in order, with retries."""

import threading
from collections.abc import Callable

from pipeline.extension_points import Sink
from pipeline.tracking.journal import Journal

_RETRY_S = (0.5, 1, 2, 5, 10)
_WARN_AFTER = 3  # failures in a row


class Sender:
    """Sends the records of a journal from the offset `sent` on, and records that are appended later.

    Args:
        journal: The records; whoever appends one notifies `condition`.
        condition: Guards the journal, and wakes the thread.
        sink: Receives the records. After an error it receives the same ones again, after a delay.
        sent: Journal offset up to which the sink has all records.
        save: Stores each new offset, so that a restart continues there.
        describe_error: Describes an error of the sink.
        warn: Receives that description after three failures in a row.
    """

    def __init__(
        self,
        journal: Journal,
        condition: threading.Condition,
        sink: Sink,
        sent: int,
        save: Callable[[int], None],
        describe_error: Callable[[Exception], str],
        warn: Callable[[str], None],
    ) -> None:
        self._journal, self._condition, self._sink = journal, condition, sink
        self._sent, self._save, self._describe_error, self._warn = min(sent, journal.size), save, describe_error, warn
        self._closing, self._give_up = False, threading.Event()
        self._thread = threading.Thread(target=self._send, name="tracker", daemon=True)
        self._thread.start()

    def flush(self, timeout_s: float) -> bool:
        """Waits until the sink has all records; returns False on timeout."""
        with self._condition:
            return self._condition.wait_for(lambda: self._sent >= self._journal.size, timeout_s)

    def close(self, timeout_s: float) -> int:
        """Sends the remaining records; returns how many the sink did not accept in time."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(timeout_s)
        self._give_up.set()
        return sum(1 for _ in self._journal.records(self._sent))

    def _send(self) -> None:
        failures = 0
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._sent < self._journal.size or self._closing)
                if self._sent >= self._journal.size:
                    return
                records, end = self._journal.read_batch(self._sent)
            try:
                self._sink.deliver(records)
            except Exception as error:  # stores raise errors of many kinds, and the next attempt may succeed
                failures += 1
                if failures == _WARN_AFTER:
                    self._warn(f"{self._describe_error(error)}; they stay in {self._journal.file} and are sent again")
                if self._give_up.wait(_RETRY_S[min(failures, len(_RETRY_S)) - 1]):
                    return
                continue
            failures = 0
            with self._condition:
                self._sent = end
                self._save(end)
                self._condition.notify_all()
