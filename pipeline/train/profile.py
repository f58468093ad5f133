"""Profiles some training steps with torch.profiler."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.files import atomic_file


class StepProfiler:
    """Traces the steps `first` to `last` (counted from 1) into a JSON file for Perfetto or chrome://tracing.

    Use it as a context manager around the run; a run that ends before `last` writes no trace.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path) -> None:
        self._steps = steps
        self.file = run_dir / "profile" / "rank0.json"
        self._profiler: profile | None = None

    def __enter__(self) -> "StepProfiler":
        if self._steps is not None and self._steps[0] == 1:
            self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()

    def step(self, done: int) -> bool:
        """Call it after each step with the number of steps done; returns whether it has just written the trace."""
        if self._steps is None:
            return False
        first, last = self._steps
        if done + 1 == first:
            self._begin()
        if done != last or self._profiler is None:
            return False
        self._profiler.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file) as temporary:
            self._profiler.export_chrome_trace(str(temporary))
        self._profiler = None
        return True

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profiler = profile(activities=activities)
        self._profiler.start()
