"""A run's events as records of its MLflow run."""

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
    """Writes steps, evaluations, checkpoints, files and restarts; the latter with causes and the samples lost.

    It goes on counting where an earlier driver of the run has stopped.
    """

    def __init__(self, tracker: Tracker, config: RunConfig, run_dir: Path) -> None:
        self._tracker, self._config, self._run_dir = tracker, config, run_dir
        self._system = SystemMetrics()
        self._skipped: set[int] = set()
        self._restarts, self._lost, self._causes = 0, 0, ""
        self._seen, self._farthest = 0, 0  # samples
        self._started = False
        for record in tracker.journal.records():
            if record["kind"] == "metrics":
                values = record["values"]
                if "restarts" not in values:  # those stand at the farthest place
                    self._seen = record["samples_seen"]
                    self._farthest = max(self._farthest, self._seen)
                self._restarts = int(values.get("restarts", self._restarts))
                self._lost = int(values.get("lost_samples", self._lost))
                self._started = True
        if self._started:
            self._causes = "the driver was started again"

    def on_event(self, event: Event) -> None:
        """Tracks one event of a run; of a kind that is for others, nothing."""
        match event:
            case Step() | Evaluated():
                self._seen = event.samples_seen
                self._farthest = max(self._farthest, self._seen)
                more = {"data/skipped": len(self._skipped)} | self._system.read()
                self._tracker.log_metrics(_metrics(event) | more, self._seen)
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
                self._went_on(event.samples_seen)
            case FirstStep():
                self._went_on(0)  # without `Resumed` before it: from the beginning

    def checkpoints(self) -> None:
        """Lists the checkpoints that there are now in the run: address, clock, results, hash."""
        records = checkpoint_records(self._config, self._run_dir)
        if not records:
            return
        file = self._run_dir / "checkpoints.json"
        with suppress(OSError):  # a full disk; the writer of the checkpoints tells of it
            write_json(file, records)
            self._tracker.log_artifact(file)
        best = [record["address"] for record in records if record["best"]]
        self._tracker.set_tags(
            {"checkpoint.last": records[-1]["address"]} | ({"checkpoint.best": best[0]} if best else {})
        )

    def _went_on(self, samples_seen: int) -> None:
        if not self._causes:
            return
        lost = max(0, self._seen - samples_seen)
        self._restarts, self._lost = self._restarts + 1, self._lost + lost
        told = f"{self._causes}; went on at {samples_seen} samples, {lost} samples were trained again"
        self._tracker.set_tags({f"restart.{self._restarts}": told})
        # MLflow takes the value at the largest step for the last one, and a step has one value: a restart that comes
        # before any progress since the last one stands a sample after it.
        at = max(self._farthest, self._tracker.last_step("restarts") + 1)
        self._tracker.log_metrics({"restarts": self._restarts, "lost_samples": self._lost}, at)
        self._tracker.log_metrics({}, samples_seen)
        self._seen, self._causes = samples_seen, ""


def _metrics(event: Step | Evaluated) -> dict[str, float]:
    """An event's numbers under their MLflow names; what is no finite number is left out."""
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
