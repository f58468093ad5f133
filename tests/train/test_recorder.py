"""Restarts in a run's MLflow records: cause, where the run resumed, lost samples; counted over all its drivers."""

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
    """Records these events as one driver."""
    with Tracker(config, run_dir, "one", print) as tracker:
        recorder = Recorder(tracker, config, run_dir)
        for event in events:
            recorder.on_event(event)
    return tracker


def test_a_lost_worker_a_resized_cluster_and_a_restarted_driver_are_recorded(tmp_path):
    config = RunConfig.model_validate({"run": {"output": str(tmp_path), "name": "one"}})
    first, last = FirstStep(8), Resumed(40, Path("x"))
    started, lost = WorkersStarted(1), WorkersLost({1: "its process or its node has gone"})
    run_dir = tmp_path / "one"
    drive(config, run_dir, [started, first, step(48), lost, started, last, first, step(64), started, last, first])
    tracker = drive(config, run_dir, [started, Resumed(8, Path("x")), first, step(16)])
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert {key: text for key, text in run.data.tags.items() if key.startswith("restart.")} == {
        "restart.1": "worker 1: its process or its node has gone; resumed at 40 samples, 8 samples are trained again",
        "restart.2": "the cluster has changed; resumed at 40 samples, 24 samples are trained again",
        "restart.3": "the driver was restarted; resumed at 8 samples, 32 samples are trained again",
    }
    assert run.data.metrics["restarts"] == 3
    assert run.data.metrics["lost_samples"] == 8 + 24 + 32
    assert "system/cpu_utilization_percentage" in run.data.metrics


def test_the_first_start_is_not_a_restart(tmp_path):
    config = RunConfig.model_validate({"run": {"output": str(tmp_path), "name": "one"}})
    tracker = drive(config, tmp_path / "one", [WorkersStarted(1), FirstStep(8), step(8)])
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert not [key for key in run.data.tags if key.startswith("restart.")]
    assert "restarts" not in run.data.metrics


def test_non_finite_metrics_are_not_logged(tmp_path):
    config = RunConfig.model_validate({"run": {"output": str(tmp_path), "name": "one"}})
    skipped = replace(step(8), loss=None, skipped_steps=2, grad_norm=float("inf"))
    evaluated = Evaluated("raw", 8, epoch=0.5, img_per_s=9.0, result=EvalResult(4, 0, 0, 5, None, non_finite=4))
    tracker = drive(config, tmp_path / "one", [skipped, evaluated])
    metrics = MlflowClient(tracker.uri).get_run(tracker.run_id).data.metrics
    assert (metrics["train/skipped_steps"], metrics["val/non_finite"], metrics["val/top1"]) == (2, 4, 0)
    assert not {"train/loss", "train/grad_norm", "val/loss"} & metrics.keys()
    assert "NaN" not in tracker.journal.file.read_text()


def test_repeated_steps_have_one_value_per_metric(tmp_path):
    """After a lost worker, a restarted driver, and restarts without progress between them."""
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
        steps_logged = [point.step for point in client.get_metric_history(tracker.run_id, key)]
        assert len(steps_logged) == len(set(steps_logged)), key
    assert [point.step for point in client.get_metric_history(tracker.run_id, "train/loss")] == [8, 16, 32, 48]
    logged = [
        (key, r["samples_seen"]) for r in tracker.journal.records() if r["kind"] == "metrics" for key in r["values"]
    ]
    assert len(logged) == len(set(logged))
