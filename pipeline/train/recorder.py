"""Logs a run's events to its MLflow run."""

import math
from contextlib import suppress
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.tracking.run import Tracker
from pipeline.tracking.system import SystemMetrics
from pipeline.train.checkpoint import write_json
from pipeline.train.checkpoint_records import checkpoint_records
from pipeline.train.events import (
    Diagnosed,
    Evaluated,
    Event,
    FirstStep,
    Profiled,
    Resumed,
    Saved,
    Skipped,
    Step,
    WorkersLost,
    WorkersStarted,
)

_STEP_METRICS = (
    "loss", "skipped_steps", "lr", "grad_norm", "img_per_s", "step_s", "data_wait", "epoch", "loss_scale",
    "gpu_memory_gb", "mfu",
)  # fmt: skip


class Recorder:
    """Logs steps, evaluations, checkpoints, files and restarts, with the restarts' causes and lost samples.

    Restart counts continue from those of earlier drivers of the run.
    """

    def __init__(self, tracker: Tracker, config: RunConfig, run_dir: Path) -> None:
        self._tracker, self._config, self._run_dir = tracker, config, run_dir
        self._system = SystemMetrics()
        self._skipped: set[int] = set()
        self._restarts, self._lost, self._causes = 0, 0, ""
        self._samples_seen, self._max_samples_seen = 0, 0
        self._started = False
        for record in tracker.journal.records():
            if record["kind"] == "metrics":
                values = record["values"]
                if "restarts" not in values:  # restarts are logged at the highest sample count
                    self._samples_seen = record["samples_seen"]
                    self._max_samples_seen = max(self._max_samples_seen, self._samples_seen)
                self._restarts = int(values.get("restarts", self._restarts))
                self._lost = int(values.get("lost_samples", self._lost))
                self._started = True
        if self._started:
            self._causes = "the driver was restarted"

    def on_event(self, event: Event) -> None:
        """Logs an event; ignores events of other types."""
        match event:
            case Step() | Evaluated():
                self._samples_seen = event.samples_seen
                self._max_samples_seen = max(self._max_samples_seen, self._samples_seen)
                extra = {"data/skipped": len(self._skipped)} | self._system.read()
                self._tracker.log_metrics(_metrics(event) | extra, self._samples_seen)
            case Saved():
                self.checkpoints()
            case Skipped():
                self._skipped.add(event.sample)
            case Profiled() | Diagnosed():
                self._tracker.log_artifact(event.file)
            case WorkersLost():
                self._causes = "; ".join(f"worker {rank}: {cause}" for rank, cause in event.causes.items())
            case WorkersStarted():
                if self._started and not self._causes:
                    self._causes = "the cluster has changed"
                self._started = True
            case Resumed():
                self._record_restart(event.samples_seen)
            case FirstStep():
                self._record_restart(0)  # without `Resumed` before it: from scratch

    def checkpoints(self) -> None:
        """Logs the list of the run's checkpoints: URI, samples seen, results, hash."""
        records = checkpoint_records(self._config, self._run_dir)
        if not records:
            return
        file = self._run_dir / "checkpoints.json"
        with suppress(OSError):  # a full disk, of which the checkpoint writer warns
            write_json(file, records)
            self._tracker.log_artifact(file)
        best = [record["address"] for record in records if record["best"]]
        self._tracker.set_tags(
            {"checkpoint.last": records[-1]["address"]} | ({"checkpoint.best": best[0]} if best else {})
        )

    def _record_restart(self, samples_seen: int) -> None:
        if not self._causes:
            return
        lost = max(0, self._samples_seen - samples_seen)
        self._restarts, self._lost = self._restarts + 1, self._lost + lost
        text = f"{self._causes}; resumed at {samples_seen} samples, {lost} samples are trained again"
        self._tracker.set_tags({f"restart.{self._restarts}": text})
        # MLflow shows the value at the largest step as the latest, and a step has one value: a restart before any
        # progress since the previous restart is logged one sample later.
        at = max(self._max_samples_seen, self._tracker.last_step("restarts") + 1)
        self._tracker.log_metrics({"restarts": self._restarts, "lost_samples": self._lost}, at)
        self._tracker.log_metrics({}, samples_seen)
        self._samples_seen, self._causes = samples_seen, ""


def _metrics(event: Step | Evaluated) -> dict[str, float]:
    """Returns an event's metrics by MLflow name, without NaN and infinities."""
    values = _values(event)
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}


def _values(event: Step | Evaluated) -> dict[str, float | None]:
    if isinstance(event, Step):
        return {f"train/{key}": getattr(event, key) for key in _STEP_METRICS}
    result, prefix = event.result, {"raw": "val", "ema": "val_ema"}[event.weights]
    return {
        f"{prefix}/top1": result.top1,
        f"{prefix}/top5": result.top5,
        f"{prefix}/loss": result.loss,
        f"{prefix}/img_per_s": event.img_per_s,
        f"{prefix}/images": result.total,
        f"{prefix}/non_finite": result.non_finite,
    }
