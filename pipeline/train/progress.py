"""Prints a run's progress: a live line in a terminal, plain lines elsewhere."""

import re
import signal
from collections import Counter

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.evaluation.counts import format_accuracy
from pipeline.formatting import duration, number, speed
from pipeline.train.events import (
    Evaluated,
    Event,
    Resumed,
    Skipped,
    Step,
    Stopped,
    Warned,
    Weights,
    WorkersLost,
    WorkersStarted,
)

WEIGHTS: dict[Weights, str] = {"raw": "", "ema": "EMA weights "}  # before an accuracy
_SKIPPED_SHOWN = 10  # the workers' logs list all of them
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def step_line(event: Step, epochs: float, total_steps: int, workers: int) -> str:
    """Formats one log line."""
    gpu = "" if event.gpu_memory_gb is None else f"{event.gpu_memory_gb:.1f} GB  "
    if event.mfu is not None:
        gpu += f"MFU {event.mfu:.0%}  "
    skipped = event.skipped_steps
    skipped_text = f"{skipped} step{'s' * (skipped > 1)} skipped  " if skipped else ""
    per_worker = f" ({speed(event.img_per_s_worker)} per worker)" if workers > 1 else ""
    return (
        f"epoch {event.epoch:.2f}/{epochs:g}  step {event.step}/{total_steps}  loss {number(event.loss)}  "
        f"{skipped_text}lr {event.lr:.4g}  {speed(event.img_per_s)}{per_worker}  "
        f"data wait {event.data_wait:.0%}  {gpu}ETA {duration(event.eta_s)}"
    )


class Display:
    """Prints a run's events, or with `quiet` only its warnings; use it as a context manager around the run."""

    def __init__(self, console: Console, epochs: float, total_steps: int, workers: int, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self._epochs, self._total_steps, self._workers = epochs, total_steps, workers
        self._starts = 0
        self._lost = False
        self.skipped: set[int] = set()
        self._warning_counts: Counter[str] = Counter()  # by text without numbers
        self._first_warnings: dict[str, str] = {}
        self.stopped_at: int | None = None
        self.stopped_by = signal.SIGTERM
        self._live = Live(
            Text(""),
            console=console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "Display":
        if self._console.is_terminal and not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live.is_started:
            self._live.stop()
        for form, count in self._warning_counts.items():
            if count > 1:
                self._print_warning(f"{count - 1} more like this, in the workers' logs: {self._first_warnings[form]}")
        self._warning_counts.clear()

    def status(self, text: str) -> None:
        """Updates the live line, or prints a line where there is none."""
        if self._live.is_started:
            self._live.update(Text(text, style="dim", no_wrap=True, overflow="ellipsis"))
        else:
            self.line(text)

    def line(self, text: str) -> None:
        """Prints a permanent line."""
        if not self._quiet:
            self._console.print(Text(text), soft_wrap=True)

    def warning(self, text: str) -> None:
        """Prints a warning in yellow, also with `quiet`.

        Prints only the first of warnings that differ only in numbers, and at the end how many more there were.
        """
        form = _NUMBER.sub("#", text)
        self._first_warnings.setdefault(form, text)
        self._warning_counts[form] += 1
        if self._warning_counts[form] == 1:
            self._print_warning(text)

    def _print_warning(self, text: str) -> None:
        self._console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)

    def on_event(self, event: Event) -> None:
        """Prints an event; ignores events of other types."""
        match event:
            case Step():
                self.status(step_line(event, self._epochs, self._total_steps, self._workers))
            case Evaluated(result=result):
                what = f"{WEIGHTS[event.weights]}{format_accuracy(result)}, loss {number(result.loss)}"
                self.line(f"epoch {event.epoch:.2f}: {what} ({speed(event.img_per_s)})")
            case Stopped():
                self.stopped_at = event.samples_seen
                self.stopped_by = self.stopped_by if event.signal is None else signal.Signals(event.signal)
            case Warned():
                self.warning(event.message)
            case Skipped():
                self.skipped.add(event.sample)
                if len(self.skipped) <= _SKIPPED_SHOWN:
                    self._print_warning(f"replaced {event.message}")
            case Resumed():
                self.line(f"resumed at {event.samples_seen} samples from {event.checkpoint}")
            case WorkersLost():
                self._lost = True
                for rank, cause in event.causes.items():
                    self._print_warning(f"worker {rank} was lost: {cause}")
            case WorkersStarted():
                self._starts += 1
                workers, previous = event.workers, self._workers
                self._workers = workers
                if self._starts > 1:
                    why = "a worker was lost" if self._lost else "the cluster has changed"
                    self._print_warning(f"{why}: all workers were restarted (start {self._starts})")
                if workers != previous:
                    self.line(f"the run now has {workers} workers, previously {previous}")
                self._lost = False
                self.status("workers started; loading the model and the data")
