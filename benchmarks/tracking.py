"""Overhead of MLflow tracking: steps with and without logging, time of a call, time to register a model.

python -m benchmarks.tracking [--model densenet121] [--batch 8] [--rounds 9]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import interleaved, machine, report, save_result, seconds
from benchmarks.engine import CLASSES, CPU, engine_step, images, settings
from pipeline.config import RunConfig
from pipeline.export.package import register
from pipeline.model.architectures import ARCHITECTURES
from pipeline.model.card import ModelCard, Transform
from pipeline.model.densenet import create
from pipeline.tracking.run import Tracker
from pipeline.train.engine import Engine
from pipeline.train.process_group import process_group

_METRICS = {f"train/metric{i}": 1.0 for i in range(10)}
_CALLS = 2000


def main() -> None:
    """Runs all comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="densenet121")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    tree = {"run": {"output": str(folder)}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}
    config = RunConfig.model_validate(tree)
    with Tracker(config, folder / "run", "benchmark", print) as tracker:
        with process_group(folder / "store"):
            tracking_overhead(options.model, options.batch, options.rounds, tracker)
        call_time(tracker)
        registration_time(folder, options.model, options.rounds, tracker)


def tracking_overhead(name: str, batch: int, rounds: int, tracker: Tracker) -> None:
    """Compares steps that log ten metrics each, in the training process, with steps without tracking."""
    images_NCHW, labels_N = images(batch)
    config, derived = settings(name, batch, 1, 0)
    engine = Engine(config, derived, create(name, CLASSES), CPU)
    seen = 0

    def tracked() -> None:
        nonlocal seen
        seen += batch
        engine_step(engine, config, images_NCHW, labels_N)
        tracker.log_metrics(_METRICS, seen)

    cases = {
        "metrics at every step": lambda: seconds(tracked),
        "no tracking": lambda: seconds(lambda: engine_step(engine, config, images_NCHW, labels_N)),
    }
    values = interleaved(cases, rounds)
    report(f"training step, {name}, batch {batch}, MLflow on SQLite", values, "s", "metrics at every step")


def call_time(tracker: Tracker) -> None:
    """Measures the time of one call of `log`, and the CPU time that it causes in total."""
    tracker.flush(60)
    cpu, started = time.process_time(), time.perf_counter()
    for i in range(_CALLS):
        tracker.log_metrics(_METRICS, 10_000 + i)
    call_us = 1e6 * (time.perf_counter() - started) / _CALLS
    tracker.flush(600)
    total_us = 1e6 * (time.process_time() - cpu) / _CALLS
    print(f"\none call of ten metrics: {machine()}: {call_us:.0f} us, {total_us:.0f} us of CPU time with the upload")
    save_result("tracking, ten metrics", "call", call_us, "us", rounds=_CALLS)
    save_result("tracking, ten metrics", "CPU time with the upload", total_us, "us", rounds=_CALLS)


def registration_time(folder: Path, name: str, rounds: int, tracker: Tracker) -> None:
    """Measures packaging, storing and registering a checkpoint."""
    checkpoint = write_model(folder / "checkpoint", name)
    times = []
    names = {"name": name, "alias": "candidate", "data_fingerprint": "f00d"}
    for _ in range(rounds):
        times.append(seconds(lambda: register(checkpoint, stores=tracker.stores, run_id=str(tracker.run_id), **names)))
    median = statistics.median(times)
    print(f"\nregister {name}: {machine()}, median of {rounds}: {median:.2f} s ({min(times):.2f} - {max(times):.2f})")
    save_result("model registration", name, median, "s", rounds=rounds)


def write_model(folder: Path, name: str) -> Path:
    """Writes the model files of a checkpoint with random weights for images of 224 pixels."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(create(name, CLASSES).state_dict(), folder / "model.safetensors")
    ModelCard(
        name=name,
        architecture=ARCHITECTURES[name],
        num_classes=CLASSES,
        classes=tuple(f"class {i}" for i in range(CLASSES)),
        weights="model.safetensors",
        transform=Transform(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        config_hash="none",
    ).write(folder)
    return folder


if __name__ == "__main__":
    main()
