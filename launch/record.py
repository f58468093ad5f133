"""A run's events as records of its MLflow run."""

from pathlib import Path
from typing import Any

from pipeline.tracking.run import Tracker

_STEP_METRICS = (
    "loss", "lr", "img_per_s", "step_s", "data_wait", "epoch", "loss_scale", "gpu_memory_gb", "mfu",
)  # fmt: skip


class Recorder:
    """Writes steps, evaluations, files and restarts; the latter with their causes and the samples lost."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._skipped: set[int] = set()
        self._restarts, self._lost, self._seen, self._causes = 0, 0, 0, ""

    def on_event(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "step" | "eval":
                self._seen = event["samples_seen"]
                self._tracker.log(_metrics(event) | {"data/skipped": len(self._skipped)}, self._seen)
            case "skipped":
                self._skipped.add(event["sample"])
            case "profile" | "diagnosis":
                self._tracker.attach(Path(event["file"]))
            case "lost":
                self._causes = "; ".join(f"worker {rank}: {cause}" for rank, cause in event["causes"].items())
            case "resumed":
                self._went_on(event["samples_seen"])
            case "first_step":
                self._went_on(0)  # without `resumed` before it: from the beginning

    def _went_on(self, samples_seen: int) -> None:
        if not self._causes:
            return
        lost = max(0, self._seen - samples_seen)
        self._restarts, self._lost = self._restarts + 1, self._lost + lost
        told = f"{self._causes}; went on at {samples_seen} samples, {lost} samples were trained again"
        self._tracker.tag(f"restart.{self._restarts}", told)
        self._tracker.log({"restarts": self._restarts, "lost_samples": self._lost}, samples_seen)
        self._causes = ""


def _metrics(event: dict[str, Any]) -> dict[str, float]:
    """An event's numbers under their MLflow names."""
    if event["kind"] == "step":
        return {f"train/{key}": event[key] for key in _STEP_METRICS if key in event}
    total, prefix = event["total"], {"raw": "val", "ema": "val_ema"}[event["weights"]]
    return {
        f"{prefix}/top1": 100 * event["top1_correct"] / total,
        f"{prefix}/top5": 100 * event["top5_correct"] / total,
        f"{prefix}/loss": event["loss"],
        f"{prefix}/img_per_s": event["img_per_s"],
        f"{prefix}/images": total,
    }
