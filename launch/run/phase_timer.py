"""Wall time of a run, by phase."""

import time

from pipeline.formatting import duration


class PhaseTimer:
    """Measures the wall time of each phase of a run, in seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.phases: dict[str, float] = {}

    def end_phase(self, phase: str) -> None:
        """Ends `phase` and starts the next."""
        now = time.monotonic()
        self.phases[phase] = now - self._last
        self._last = now

    def __str__(self) -> str:
        return " · ".join(f"{name} {duration(seconds)}" for name, seconds in self.phases.items())
