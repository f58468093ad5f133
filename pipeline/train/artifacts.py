"""Artifacts, params, tags and data sets that a run logs to MLflow in addition to its events."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.dataset import DatasetIndex, read_manifest
from pipeline.data.staging import is_remote
from pipeline.evaluation.tables import CONFUSION, read_confusion, write_csv
from pipeline.files import write_text
from pipeline.tracking.plots import confusion_image, curve, curves
from pipeline.tracking.provenance import provenance_tags, write_provenance
from pipeline.tracking.run import Tracker
from pipeline.train.checkpoint import write_json
from pipeline.train.deepspeed_config import deepspeed_config
from pipeline.train.schedule import learning_rate
from pipeline.train.setup import RunSetup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = "samples.json"
_PLOTTED = 1000
_CURVES = {
    "loss.png": ("loss", ("train/loss", "val/loss", "val_ema/loss")),
    "accuracy.png": ("top-1 %", ("val/top1", "val_ema/top1")),
}


def record_setup(tracker: Tracker, setup: RunSetup) -> None:
    """Logs the config, the derived values, data, code, package versions and machine."""
    config, derived, run_dir = setup.config, setup.derived, setup.run_dir
    data_license = config.data.license or _recorded_license(setup.train_index)
    tracker.log_params(config.model_dump(mode="json") | {"derived": derived.model_dump(mode="json")})
    tracker.set_tags(
        provenance_tags()
        | {
            "data.train.fingerprint": setup.train_index.fingerprint,
            "data.val.fingerprint": setup.val_index.fingerprint,
            "eval.transform": config.eval.description,
        }
        | ({} if data_license is None else {"data.license": data_license})
    )
    for context, split, index in (
        ("training", config.data.train, setup.train_index),
        ("validation", config.data.val, setup.val_index),
    ):
        name = f"{Path(str(config.data.root)).name}/{split}"
        profile = {"images": len(index), "classes": len(index.classes), "bytes": index.total_bytes}
        tracker.log_dataset(context, name, index.fingerprint, str(config.data.root), profile)
    write_json(run_dir / "deepspeed.json", deepspeed_config(config, derived))
    for file in (run_dir / "config.yaml", run_dir / "deepspeed.json", *write_provenance(run_dir)):
        tracker.log_artifact(file)


def _recorded_license(index: DatasetIndex) -> str | None:
    """Returns the license in the `dataset.json` of prepared data, or None."""
    manifest = read_manifest(index.root)
    return None if manifest is None else manifest.made.get("license")


def attach_schedule(tracker: Tracker, setup: RunSetup) -> None:
    """Logs a plot of the learning rate of the whole run."""
    config, derived = setup.config, setup.derived
    stride = max(1, derived.total_steps // _PLOTTED)
    samples = [step * derived.global_batch_size for step in range(0, derived.total_steps, stride)]
    learning_rates = [learning_rate(config.schedule, derived, samples_seen) for samples_seen in samples]
    epochs = [samples_seen / derived.train_samples for samples_seen in samples]
    _attach_image(tracker, curve(epochs, learning_rates, "epoch", "learning rate"), setup.run_dir / "learning_rate.png")


def attach_curves(tracker: Tracker, setup: RunSetup) -> None:
    """Logs all metrics as a table, and plots of losses, accuracies and the best evaluation's confusion matrix."""
    run_dir = setup.run_dir
    rows = [
        (record["samples_seen"], record["time_ms"], key, value)
        for record in tracker.journal.records()
        if record["kind"] == "metrics"
        for key, value in record["values"].items()
    ]
    write_csv(run_dir / "metrics.csv", ("samples_seen", "time_ms", "metric", "value"), rows)
    tracker.log_artifact(run_dir / "metrics.csv")
    for file, (label, keys) in _CURVES.items():
        lines = {
            key: [(seen / setup.derived.train_samples, value) for seen, _, metric, value in rows if metric == key]
            for key in keys
        }
        lines = {key: points for key, points in lines.items() if points}
        _attach_image(tracker, curves(lines, "epoch", label), run_dir / file)
    if (run_dir / CONFUSION).is_file():
        tracker.log_artifact(run_dir / CONFUSION)
        classes, matrix_KK = read_confusion((run_dir / CONFUSION).read_text(encoding="utf-8"))
        _attach_image(tracker, confusion_image(classes, matrix_KK), run_dir / "confusion.png")


def attach_sample_predictions(tracker: Tracker, setup: RunSetup, best: Path) -> None:
    """Logs the best model's predictions for some images, where the driver can read the data."""
    index: DatasetIndex = setup.val_index
    if index.address is not None or is_remote(str(setup.config.data.root)):
        return
    from pipeline.evaluation.samples import sample_predictions  # torch, timm and DALI: imported only here

    file = setup.run_dir / SAMPLES
    write_text(file, json.dumps(sample_predictions(best, index)))
    tracker.log_artifact(file)


def _attach_image(tracker: Tracker, figure: "Figure", file: Path) -> None:
    figure.savefig(file, dpi=120)
    tracker.log_artifact(file)
