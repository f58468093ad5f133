"""How cost grows with samples, ranks and epochs, without images and without training.

    python -m benchmarks.growth [--largest 9]

Samples (10,000 to 10 million; the order of an epoch to 10^`--largest`, next to a sort of at most 10^8): a synthetic
index, as in `benchmarks.index_scale`.
Ranks (1 to 1,024): the plan of one rank, and a real event channel that answers as many calls as there are ranks. Epochs
(1 to 100): the journal of a run that logs 100 steps per epoch, read at a restart.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import save_result, seconds
from benchmarks.epoch_order import first_batch, peak_memory, sorted_order, whole_order
from benchmarks.index_scale import EPOCH, measure, write_set
from launch.cluster.local_ray import embedded_ray
from pipeline.config import RunConfig
from pipeline.data.dataset import index_file
from pipeline.data.plan import TrainPlan, micro_batch
from pipeline.evaluation.counts import EvalResult
from pipeline.tracking.run import Tracker
from pipeline.train.events import Evaluated, Step
from pipeline.train.recorder import Recorder

SAMPLES = (10_000, 100_000, 1_000_000, 10_000_000)
RANKS = (1, 8, 64, 512, 1024)
EPOCHS = (1, 10, 100)
SAMPLES_PER_SHARD, STEPS_PER_EPOCH, DEVICE_BATCH, ROUNDS = 1165, 100, 32, 5
LARGEST_SORT = 10**8  # 1.6 GB


def main() -> None:
    """Measures all three."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--largest", type=int, default=9, help="power of ten of the longest epoch; one minute for 9")
    options = parser.parse_args()
    for samples in SAMPLES:
        grow_samples(samples)
    for power in range(4, options.largest + 1):
        grow_order(10**power)
    for ranks in RANKS:
        grow_ranks(ranks)
    grow_channel()
    for epochs in EPOCHS:
        grow_epochs(epochs)


def save(axis: str, quantity: str, size: int, value: float, unit: str) -> None:
    """Prints and saves one value; `benchmarks.page` shows the values of a quantity in one row."""
    print(f"{quantity:44} {size:>12,} {axis:8} {value:12.4g} {unit}", flush=True)
    save_result(f"growth with {axis}: {quantity}", f"{size}", value, unit)


def grow_samples(samples: int) -> None:
    """Measures the index: size on disk, time and memory to open it, first batch, fingerprint."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_set(root, samples)
        runs = [measure(root, EPOCH * samples + samples // 2) for _ in range(3)]
        save("samples", "index on disk", samples, index_file(root, "train").stat().st_size / 1e6, "MB")
    for key, quantity in (
        ("open", "open the index"),
        ("ready", "open the index, plan a batch of epoch 57"),
        ("fingerprint", "fingerprint"),
    ):
        save("samples", quantity, samples, statistics.median(run[key] for run in runs), "s")
    save(
        "samples",
        "memory of the index in one rank",
        samples,
        statistics.median(run["memory"] for run in runs) / 1e6,
        "MB",
    )


def grow_order(samples: int) -> None:
    """Measures the order of an epoch: time and memory of its first batch, time of all of it; the same for a sort."""
    first = statistics.median(seconds(lambda e=e: first_batch(samples, e)) for e in range(ROUNDS))  # type: ignore[misc]
    save("samples", "order of an epoch: first batch", samples, 1e3 * first, "ms")
    memory = peak_memory(lambda: first_batch(samples, EPOCH)) / 1e6
    save("samples", "order of an epoch: memory", samples, memory, "MB")
    save("samples", "order of an epoch", samples, seconds(lambda: whole_order(samples, EPOCH + 1)), "s")
    if samples <= LARGEST_SORT:
        save("samples", "order by sorting", samples, seconds(lambda: sorted_order(samples, EPOCH)), "s")
        memory = peak_memory(lambda: sorted_order(samples, EPOCH)) / 1e6
        save("samples", "order by sorting: memory", samples, memory, "MB")


def grow_ranks(ranks: int) -> None:
    """Measures the time in which the last rank plans a micro-batch."""
    sides_N = np.full(1_281_167, 500)
    plan = TrainPlan(0, sides_N, sides_N, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    plan.batch(micro_batch(0, 0, ranks - 1, ranks, DEVICE_BATCH, 1), 224)  # creates the epoch's order
    times = [
        seconds(lambda step=step: plan.batch(micro_batch(step, 0, ranks - 1, ranks, DEVICE_BATCH, 1), 224))  # type: ignore[misc]
        for step in range(1, ROUNDS + 1)
    ]
    save("ranks", f"plan of {DEVICE_BATCH} images in one rank", ranks, 1e3 * statistics.median(times), "ms")


def grow_channel() -> None:
    """Measures the event channel's answers to one call of every rank, as at a log step."""
    times: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, embedded_ray(2, Path(folder) / "ray.log"):
        import ray

        from launch.cluster.event_channel import open_event_channel

        channel = open_event_channel("growth")
        ray.get(channel.stop_requested.remote())
        for ranks in RANKS:
            times[ranks] = [
                seconds(lambda ranks=ranks: ray.get([channel.stop_requested.remote() for _ in range(ranks)]))  # type: ignore[misc]
                for _ in range(ROUNDS)
            ]
    for ranks, values in times.items():  # here, because Ray's log takes what is printed while Ray runs
        save("ranks", "event channel, one call of every rank", ranks, 1e3 * statistics.median(values), "ms")


def grow_epochs(epochs: int) -> None:
    """Measures what a run has logged after some epochs, and how long the next driver reads it."""
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.model_validate(
            {"run": {"output": folder}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}
        )
        run_dir = Path(folder) / "run"
        with Tracker(config, run_dir, "growth", print) as tracker:
            journal = tracker.journal
            recorder = Recorder(tracker, config, run_dir)
            for number in range(epochs * STEPS_PER_EPOCH):
                recorder.on_event(_step(number))
                if number % STEPS_PER_EPOCH == STEPS_PER_EPOCH - 1:
                    recorder.on_event(_evaluated(number))
            save("epochs", "journal", epochs, journal.size / 1e6, "MB")
            save("epochs", "records for MLflow", epochs, sum(1 for _ in journal.records()), "records")
            restart = statistics.median(seconds(lambda: Recorder(tracker, config, run_dir)) for _ in range(3))
            save("epochs", "read the journal at a restart", epochs, restart, "s")


def _step(number: int) -> Step:
    values: dict[str, float] = dict.fromkeys((field.name for field in dataclasses.fields(Step)), 1.0)
    return Step(**values | {"step": number, "samples_seen": number})  # type: ignore[arg-type]


def _evaluated(number: int) -> Evaluated:
    result = EvalResult(total=50_000, top1_correct=35_000, top5_correct=45_000, top5_k=5, loss=1.0)
    return Evaluated(weights="raw", samples_seen=number, epoch=1.0, img_per_s=1.0, result=result)


if __name__ == "__main__":
    main()
