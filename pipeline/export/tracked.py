"""Tracks a training run in MLflow from its start to its registered model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.export.package import RegisteredModel
from pipeline.export.registration import check_registry, reason_not_to_register, send_and_register
from pipeline.tracking.run import Tracker
from pipeline.train.artifacts import attach_curves, attach_sample_predictions, attach_schedule, record_setup
from pipeline.train.checkpoint import best_checkpoint
from pipeline.train.events import Event, Step
from pipeline.train.recorder import Recorder
from pipeline.train.run_lock import PROBE
from pipeline.train.setup import RunSetup
from pipeline.train.storage import fetch_checkpoints_or_warn


class TrackedRun:
    """Logs a run's events, artifacts and model; `warn` receives messages about what could not be logged."""

    def __init__(self, setup: RunSetup, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self.tracker = tracker
        self._setup, self._warn = setup, warn
        self._has_schedule = False
        self._recorder = Recorder(tracker, setup.config, setup.run_dir)

    def on_event(self, event: Event) -> None:
        """Logs one event."""
        self._recorder.on_event(event)
        if isinstance(event, Step) and not self._has_schedule:  # not before the first step: it takes a second
            self._has_schedule = True
            with _errors_as_warnings(self._warn):
                attach_schedule(self.tracker, self._setup)

    def attach_logs(self) -> None:
        """Logs the workers' log files as artifacts, to diagnose a failed run."""
        for log in sorted((self._setup.run_dir / "logs").glob("*.log")):
            self.tracker.log_artifact(log, "logs")

    def attach_curves(self) -> None:
        """Logs plots of the run's metrics."""
        with _errors_as_warnings(self._warn):
            attach_curves(self.tracker, self._setup)

    def register(self) -> tuple[Path, RegisteredModel | None]:
        """Logs the results of the run and registers its best checkpoint, unless its outputs are non-finite.

        Raises:
            UserError: A store is still unreachable after the timeout, or rejects the model; the message has the
                command that registers the model later.
        """
        config, run_dir = self._setup.config, self._setup.run_dir
        fetch_checkpoints_or_warn(config, run_dir, self._warn)
        self._recorder.checkpoints()
        best = best_checkpoint(run_dir)
        with _errors_as_warnings(self._warn):
            attach_sample_predictions(self.tracker, self._setup, best)
        reason = reason_not_to_register(best)
        if reason is not None:
            self._warn(f"the model is not registered: {reason}; lower optim.lr or set optim.clip_grad_norm")
            return best, None
        wait_timeout_s = config.tracking.wait_timeout_s
        return best, send_and_register(config, run_dir, self.tracker, self._warn, wait_timeout_s)


@contextmanager
def tracked(setup: RunSetup, warn: Callable[[str], None]) -> Iterator[TrackedRun]:
    """Starts tracking a run, after checking that tracking store, artifact store and registry accept its results.

    Raises:
        UserError: A store denies access, or is unreachable (unless `tracking.on_unreachable` is `spool`).
    """
    config, run_dir = setup.config, setup.run_dir
    check_registry(config, warn)
    with Tracker(config, run_dir, str(config.run.name), warn) as tracker:
        tracker.check_store(run_dir / PROBE)
        with _errors_as_warnings(warn):
            record_setup(tracker, setup)
        yield TrackedRun(setup, tracker, warn)


@contextmanager
def _errors_as_warnings(warn: Callable[[str], None]) -> Iterator[None]:
    """Turns errors of optional artifacts into warnings."""
    try:
        yield
    except Exception as error:  # of any kind: plots and tables must not stop or fail the run
        warn(f"some plots and tables could not be logged: {error}")
