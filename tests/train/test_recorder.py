"""Restarts in a run's records: why, where it went on, what was trained again; counted over all its drivers."""

from dataclasses import replace
from pathlib import Path

from mlflow.tracking import MlflowClient

from pipeline.config import RunConfig
from pipeline.evaluation.counts import EvalResult
from pipeline.tracking.run import Tracker
from pipeline.train.events import Evaluated, Event, FirstStep, Resumed, Step, WorkersLost, WorkersStarted
from pipeline.train.recorder import Recorder


def step(samples_seen: int) -> Step:
    speed = {"img_per_s": 9.0, "img_per_s_worker": 9.0, "step_s": 1.0, "data_wait": 0.1, "eta_s": 9.0}
    return Step(1, samples_seen, epoch=0.5, lr=0.1, loss=1.0, skipped_steps=0, **speed)


def drive(config: RunConfig, run_dir: Path, events: list[Event]) -> Tracker:
    """One driver that hears these events."""
    with Tracker(config, run_dir, "one", print) as tracker:
        recorder = Recorder(tracker, config, run_dir)
        for event in events:
            recorder.on_event(event)
    return tracker


def test_a_lost_worker_a_grown_cluster_and_a_driver_that_was_started_again(tmp_path):
    config = RunConfig.model_validate({"run": {"output": str(tmp_path), "name": "one"}})
    first, last = FirstStep(8), Resumed(40, Path("x"))
    started, lost = WorkersStarted(1), WorkersLost({1: "its process or its node has gone"})
    run_dir = tmp_path / "one"
    drive(config, run_dir, [started, first, step(48), lost, started, last, first, step(64), started, last, first])
    tracker = drive(config, run_dir, [started, Resumed(8, Path("x")), first, step(16)])
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert {key: text for key, text in run.data.tags.items() if key.startswith("restart.")} == {
        "restart.1": "worker 1: its process or its node has gone; went on at 40 samples, 8 samples were trained again",
        "restart.2": "the cluster has changed; went on at 40 samples, 24 samples were trained again",
        "restart.3": "the driver was started again; went on at 8 samples, 32 samples were trained again",
    }
    assert run.data.metrics["restarts"] == 3
    assert run.data.metrics["lost_samples"] == 8 + 24 + 32
    assert "system/cpu_utilization_percentage" in run.data.metrics


def test_the_first_start_is_no_restart(tmp_path):
    config = RunConfig.model_validate({"run": {"output": str(tmp_path), "name": "one"}})
    tracker = drive(config, tmp_path / "one", [WorkersStarted(1), FirstStep(8), step(8)])
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert not [key for key in run.data.tags if key.startswith("restart.")]
    assert "restarts" not in run.data.metrics


def test_what_is_no_number_is_no_metric(tmp_path):
    config = RunConfig.model_validate({"run": {"output": str(tmp_path), "name": "one"}})
    skipped = replace(step(8), loss=None, skipped_steps=2, grad_norm=float("inf"))
    evaluated = Evaluated("raw", 8, epoch=0.5, img_per_s=9.0, result=EvalResult(4, 0, 0, 5, None, non_finite=4))
    tracker = drive(config, tmp_path / "one", [skipped, evaluated])
    metrics = MlflowClient(tracker.uri).get_run(tracker.run_id).data.metrics
    assert (metrics["train/skipped_steps"], metrics["val/non_finite"], metrics["val/top1"]) == (2, 4, 0)
    assert not {"train/loss", "train/grad_norm", "val/loss"} & metrics.keys()
    assert "NaN" not in tracker.journal.file.read_text()


def test_steps_that_are_trained_again_leave_one_value_each(tmp_path):
    """By a lost worker, by a driver that is started again, and by restarts without any progress between them."""
    config = RunConfig.model_validate({"run": {"output": str(tmp_path), "name": "one"}})
    first, again = FirstStep(8), Resumed(8, Path("x"))
    started, lost = WorkersStarted(1), WorkersLost({0: "gone"})
    evaluated = Evaluated("raw", 32, epoch=1.0, img_per_s=9.0, result=EvalResult(4, 1, 2, 5, 0.5))
    run_dir, steps = tmp_path / "one", [step(8), step(16), step(32), evaluated]
    drive(config, run_dir, [started, first, *steps, lost, started, again, *steps, lost, started, again, step(16)])
    tracker = drive(config, run_dir, [started, again, *steps, step(48)])
    client = MlflowClient(tracker.uri)
    run = client.get_run(tracker.run_id)
    assert run.data.metrics["restarts"] == 3
    assert run.data.metrics["lost_samples"] == 24 + 24 + 8
    for key in run.data.metrics:
        there = [point.step for point in client.get_metric_history(tracker.run_id, key)]
        assert len(there) == len(set(there)), key
    assert [point.step for point in client.get_metric_history(tracker.run_id, "train/loss")] == [8, 16, 32, 48]
    told = [
        (key, r["samples_seen"]) for r in tracker.journal.records() if r["kind"] == "metrics" for key in r["values"]
    ]
    assert len(told) == len(set(told))
