"""Progress of long passes over files, on standard error."""

import sys
import time

_INTERVAL_S = 10


class Progress:
    """Prints a line every ten seconds: `indexing train: 1,200,000 of 14,197,122 files, 52,000 files/s`."""

    def __init__(self, description: str, total: int | None = None) -> None:
        self._description, self._total, self._done = description, total, 0
        self._started = self._printed = time.monotonic()

    def add(self, files: int) -> None:
        """Counts files."""
        self._done += files
        now = time.monotonic()
        if now - self._printed >= _INTERVAL_S:
            self._printed = now
            total = f" of {self._total:,}" if self._total is not None else ""
            rate = self._done / (now - self._started)
            print(f"{self._description}: {self._done:,}{total} files, {rate:,.0f} files/s", file=sys.stderr, flush=True)
