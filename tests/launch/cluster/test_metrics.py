"""Prometheus metrics of a run: what the driver's events set, without a cluster."""

import time
from pathlib import Path

import pytest

from launch.cluster.metrics import COUNTERS, GAUGES, RunMetrics
from pipeline.evaluation.counts import EvalResult
from pipeline.train.events import (
    Diagnosed,
    Evaluated,
    FirstStep,
    Resumed,
    Saved,
    Step,
    WorkersLost,
    WorkersStarted,
)

STEP = Step(
    step=10,
    samples_seen=640,
    epoch=0.5,
    lr=0.1,
    loss=1.25,
    skipped_steps=0,
    img_per_s=99.0,
    img_per_s_worker=49.5,
    step_s=0.5,
    data_wait=0.1,
    eta_s=62,
    gpu_memory_gb=1.5,
    slow_ranks=1,
    slowest_rank=3,
    slowest_rank_ratio=1.5,
)


class RecordedMetrics(RunMetrics):
    """Metrics whose counters are read here; Ray exports them on a cluster alone."""

    def __init__(self) -> None:
        super().__init__("one", target_samples=1280)
        self.counts = dict.fromkeys(COUNTERS, 0.0)
        for name, counter in self._counters.items():
            counter.inc = lambda value=1.0, name=name: self._add(name, value)

    def _add(self, name: str, value: float) -> None:
        self.counts[name] += value


@pytest.fixture
def metrics():
    recorded = RecordedMetrics()
    recorded.start()
    yield recorded
    recorded.stop()


def test_a_step_sets_gauges_in_base_units(metrics):
    metrics.on_event(WorkersStarted(4))
    metrics.on_event(STEP)
    values = metrics.values
    assert values.keys() <= GAUGES.keys()
    for name, expected in {
        "target_samples": 1280,
        "samples_seen": 640,
        "workers": 4,
        "loss": 1.25,
        "learning_rate": 0.1,
        "images_per_second": 99,
        "step_seconds": 0.5,
        "data_wait_ratio": 0.1,
        "eta_seconds": 62,
        "gpu_memory_peak_bytes": 1.5e9,
        "slow_ranks": 1,
        "slowest_rank": 3,
        "slowest_rank_ratio": 1.5,
    }.items():
        assert values[f"densenet_{name}"] == expected, name
    assert "densenet_mfu_ratio" not in values, "unknown on this device"


def test_evaluations_and_checkpoints(metrics):
    assert "densenet_last_checkpoint_timestamp_seconds" not in metrics.values
    result = EvalResult(total=4, top1_correct=3, top5_correct=4, top5_k=4, loss=0.5)
    metrics.on_event(Evaluated("raw", 640, 0.5, 9.0, result))
    metrics.on_event(Evaluated("ema", 640, 0.5, 9.0, EvalResult(4, 2, 4, 4, 0.7)))
    metrics.on_event(Saved(640, Path("checkpoint"), 0.1, 0.1))
    values = metrics.values
    assert (values["densenet_val_top1_ratio"], values["densenet_val_loss"]) == (0.75, 0.5)
    assert values["densenet_val_ema_top1_ratio"] == 0.5
    assert values["densenet_last_checkpoint_timestamp_seconds"] == pytest.approx(time.time(), abs=60)
    assert values["densenet_last_progress_timestamp_seconds"] >= values["densenet_start_timestamp_seconds"]


def test_a_restart_is_counted_and_ends_the_series_of_the_workers(metrics):
    metrics.on_event(WorkersStarted(4))
    metrics.on_event(FirstStep(64))
    metrics.on_event(STEP)
    assert metrics.counts["densenet_restarts"] == 0
    progress = metrics.values["densenet_last_progress_timestamp_seconds"]
    metrics.on_event(WorkersLost({1: "its process or node died"}))
    assert not {"densenet_images_per_second", "densenet_slow_ranks", "densenet_workers"} & metrics.values.keys()
    assert metrics.values["densenet_samples_seen"] == 640
    metrics.on_event(WorkersStarted(3))
    metrics.on_event(Resumed(320, Path("checkpoint")))
    assert metrics.values["densenet_last_progress_timestamp_seconds"] == progress, "a restart is no progress"
    assert (metrics.values["densenet_samples_seen"], metrics.values["densenet_workers"]) == (320, 3)
    assert metrics.counts["densenet_worker_failures"] == metrics.counts["densenet_restarts"] == 1
    metrics.on_event(WorkersStarted(4))  # the cluster has grown
    assert (metrics.counts["densenet_worker_failures"], metrics.counts["densenet_restarts"]) == (1, 2)


def test_steps_without_an_update_are_counted(metrics):
    metrics.on_event(Diagnosed(Path("step-7.json")))
    skipped = {"step": 20, "loss": None, "skipped_steps": 3}
    metrics.on_event(Step(**(vars(STEP) | skipped)))
    metrics.on_event(Step(**(vars(STEP) | skipped)))
    assert (metrics.counts["densenet_non_finite_steps"], metrics.counts["densenet_skipped_steps"]) == (1, 6)
    assert "densenet_loss" not in metrics.values
