"""A run that MLflow records, from its beginning to its registered model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.export.package import RegisteredModel
from pipeline.export.registration import check_registry, reason_not_to_register, send_and_register
from pipeline.tracking.run import Tracker
from pipeline.train.artifacts import attach_curves, attach_samples, begin
from pipeline.train.checkpoint import best_checkpoint
from pipeline.train.events import Event
from pipeline.train.recorder import Recorder
from pipeline.train.run_lock import PROBE
from pipeline.train.setup import RunSetup
from pipeline.train.storage import fetch_best


class TrackedRun:
    """Records a run's events and what comes of it; `warn` is told of what could not be recorded."""

    def __init__(self, setup: RunSetup, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self.tracker = tracker
        self._setup, self._warn = setup, warn
        self._recorder = Recorder(tracker, setup.config, setup.run_dir)

    def on_event(self, event: Event) -> None:
        """Tracks one event."""
        self._recorder.on_event(event)

    def attach_logs(self) -> None:
        """Records the workers' logs: those of a failed run tell what lies behind it."""
        for log in sorted((self._setup.run_dir / "logs").glob("*.log")):
            self.tracker.log_artifact(log, "logs")

    def attach_curves(self) -> None:
        """Records the run's curves."""
        with _only_warns(self._warn):
            attach_curves(self.tracker, self._setup)

    def register(self) -> tuple[Path, RegisteredModel | None]:
        """Records what came of the run, and registers its best checkpoint, unless its outputs are not finite.

        Raises:
            UserError: a store does not answer in time, or refuses; the message says how to go on without training.
        """
        config, run_dir = self._setup.config, self._setup.run_dir
        fetch_best(config, run_dir, self._warn)
        self._recorder.checkpoints()
        best = best_checkpoint(run_dir)
        with _only_warns(self._warn):
            attach_samples(self.tracker, self._setup, best)
        reason = reason_not_to_register(best)
        if reason is not None:
            self._warn(f"the model is not registered: {reason}; lower optim.lr or set optim.clip_grad_norm")
            return best, None
        wait_timeout_s = config.tracking.wait_timeout_s
        return best, send_and_register(config, run_dir, self.tracker, self._warn, wait_timeout_s)


@contextmanager
def tracked(setup: RunSetup, warn: Callable[[str], None]) -> Iterator[TrackedRun]:
    """Opens the run's record, after a look whether registry and stores will take what its end brings.

    Raises:
        UserError: one refuses, or is away, unless `tracking.on_unreachable` is `spool`.
    """
    config, run_dir = setup.config, setup.run_dir
    check_registry(config, warn)
    with Tracker(config, run_dir, str(config.run.name), warn) as tracker:
        tracker.check_store(run_dir / PROBE)
        with _only_warns(warn):
            begin(tracker, setup)
        yield TrackedRun(setup, tracker, warn)


@contextmanager
def _only_warns(warn: Callable[[str], None]) -> Iterator[None]:
    """Makes what only adorns a run a warning where it fails."""
    try:
        yield
    except Exception as error:  # of whatever kind: the training that it adorns goes on, or is complete
        warn(f"not all images and tables could be recorded: {error}")
