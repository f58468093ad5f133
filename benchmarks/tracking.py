"""What tracking costs a training: steps with and without a tracker, a call's time, the time to register a model.

python -m benchmarks.tracking [--model densenet121] [--batch 8] [--rounds 9]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import in_turns, keep, machine, report, seconds
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
    """Runs the comparisons one after the other."""
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
            overhead(options.model, options.batch, options.rounds, tracker)
        calls(tracker)
        registration(folder, options.model, options.rounds, tracker)


def overhead(name: str, batch: int, rounds: int, tracker: Tracker) -> None:
    """Steps whose ten metrics are recorded at every step, in the training process itself, beside steps without."""
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
        "a record each step": lambda: seconds(tracked),
        "no tracking": lambda: seconds(lambda: engine_step(engine, config, images_NCHW, labels_N)),
    }
    report(f"step, {name}, batch {batch}, on SQLite", in_turns(cases, rounds), "s", "a record each step")


def calls(tracker: Tracker) -> None:
    """What one call costs the caller, and all the processor's time that it leads to."""
    tracker.flush(60)
    cpu, started = time.process_time(), time.perf_counter()
    for i in range(_CALLS):
        tracker.log_metrics(_METRICS, 10_000 + i)
    call_us = 1e6 * (time.perf_counter() - started) / _CALLS
    tracker.flush(600)
    total_us = 1e6 * (time.process_time() - cpu) / _CALLS
    print(f"\none call of ten metrics: {machine()}: {call_us:.0f} us, with sending {total_us:.0f} us of CPU time")
    keep("tracking, ten metrics", "call", call_us, "us", rounds=_CALLS)
    keep("tracking, ten metrics", "CPU time with sending", total_us, "us", rounds=_CALLS)


def registration(folder: Path, name: str, rounds: int, tracker: Tracker) -> None:
    """Packages, stores and registers a checkpoint."""
    checkpoint = write_model(folder / "checkpoint", name)
    took = []
    names = {"name": name, "alias": "candidate", "data_fingerprint": "f00d"}
    for _ in range(rounds):
        took.append(seconds(lambda: register(checkpoint, stores=tracker.stores, run_id=str(tracker.run_id), **names)))
    middle = statistics.median(took)
    print(f"\nregister {name}: {machine()}, median of {rounds}: {middle:.2f} s ({min(took):.2f} - {max(took):.2f})")
    keep("registration", name, middle, "s", rounds=rounds)


def write_model(folder: Path, name: str) -> Path:
    """A checkpoint's folder with new weights, as far as it is a model for images of 224 pixels."""
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
