"""Ends a process that hangs, after writing the stacks of its threads."""

import faulthandler
import os
import sys
import threading
import time
from typing import TextIO

_GRACE_S = 10.0  # lets every rank write its stacks before the end of the first rank ends the others


class Watchdog:
    """Writes all threads' stacks after `timeout_s` seconds without `heartbeat`, and then ends the process.

    Use it as a context manager. The stacks go to `file` (standard error by default), even while another thread holds
    the interpreter's lock. The process ends with exit code 1, `grace_s` seconds after the timeout.
    """

    def __init__(self, timeout_s: float, file: TextIO | None = None, grace_s: float = _GRACE_S) -> None:
        self._timeout_s, self._file, self._grace_s = timeout_s, file or sys.stderr, grace_s
        self._done = threading.Event()
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.heartbeat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def heartbeat(self) -> None:
        """Restarts the timeout; call it whenever there is progress."""
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(self._timeout_s, file=self._file)

    def _watch(self) -> None:
        limit_s = self._timeout_s + self._grace_s
        while not self._done.wait(max(0.1, self._last + limit_s - time.monotonic())):
            if time.monotonic() - self._last >= limit_s:
                os._exit(1)
