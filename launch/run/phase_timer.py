"""Where the time of a run goes."""

import time

from pipeline.formatting import duration


class PhaseTimer:
    """Wall time of each phase of a run, in the order in which they ended."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.phases: dict[str, float] = {}

    def ended(self, phase: str) -> None:
        """Ends `phase`; the next one begins."""
        now = time.monotonic()
        self.phases[phase] = now - self._last
        self._last = now

    def __str__(self) -> str:
        return " · ".join(f"{name} {duration(seconds)}" for name, seconds in self.phases.items())
