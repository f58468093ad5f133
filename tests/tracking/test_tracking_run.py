"""One MLflow run: what is logged, continued runs, limits, a server that goes away and comes back."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking.run import Tracker, tracking_uri
from tests.servers import PATIENCE_S, MlflowServer


def config(tmp_path: Path, **tracking: str) -> RunConfig:
    return RunConfig.model_validate({"run": {"output": str(tmp_path)}, "tracking": tracking})


def start(config: RunConfig, tmp_path: Path, **changes: object) -> Tracker:
    arguments: dict = {"run_dir": tmp_path / "run", "run_name": "one", "params": {"derived.workers": 2}, "tags": {}}
    return Tracker.start(config, **(arguments | changes))


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_a_run_holds_config_versions_and_metrics_on_the_samples_clock(tmp_path):
    c = config(tmp_path)
    tracker = start(c, tmp_path, tags={"eval.transform": c.eval.description})
    for i in range(5):
        tracker.log({"train/loss": 1 / (i + 1), "train/lr": 0.1}, samples_seen=64 * i)
    assert tracker.finish("FINISHED") == 0
    client = MlflowClient(tracking_uri(c))
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "one"
    assert run.data.params["optim.lr"] == "0.1"
    assert run.data.params["derived.workers"] == "2"
    assert run.data.tags["eval.transform"].startswith("resize 256")
    assert "version.torch" in run.data.tags
    assert history(client, tracker.run_id, "train/loss") == [(64 * i, 1 / (i + 1)) for i in range(5)]
    artifact = client.download_artifacts(tracker.run_id, "config.yaml", str(tmp_path))
    assert Path(artifact).read_text() == c.to_yaml()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_seen"] for line in lines] == [0, 64, 128, 192, 256]


def test_a_run_that_is_continued_stays_one_and_records_what_changed(tmp_path):
    c = config(tmp_path)
    first = start(c, tmp_path)
    first.log({"loss": 1.0}, 10)
    first.finish("FAILED")
    second = start(c, tmp_path, run_id=first.run_id, params={"derived.workers": 4})
    client = MlflowClient(tracking_uri(c))
    assert client.get_run(first.run_id).info.status == "RUNNING"
    second.log({"loss": 0.5}, 20)
    second.finish("FINISHED")
    run = client.get_run(first.run_id)
    assert run.data.params["derived.workers"] == "2"
    assert run.data.tags["changed.derived.workers"] == "4"
    assert history(client, first.run_id, "loss") == [(10, 1.0), (20, 0.5)]


def test_more_metrics_than_a_call_may_hold_and_a_long_parameter(tmp_path):
    c = config(tmp_path)
    tracker = start(c, tmp_path, params={"long": "x" * 10_000})
    tracker.log({f"m{i}": float(i) for i in range(2500)}, 1)
    assert tracker.finish("FINISHED") == 0
    run = MlflowClient(tracking_uri(c)).get_run(tracker.run_id)
    assert len(run.data.metrics) == 2500
    assert len(run.data.params["long"]) == 6000


def test_a_store_of_an_unknown_kind_and_a_deleted_experiment_are_refused(tmp_path):
    with pytest.raises(UserError, match="no MLflow tracking store answers at carrier-pigeon://x"):
        start(config(tmp_path, uri="carrier-pigeon://x"), tmp_path)
    c = config(tmp_path)
    start(c, tmp_path).finish("FINISHED")
    client = MlflowClient(tracking_uri(c))
    client.delete_experiment(client.get_experiment_by_name("densenet").experiment_id)
    with pytest.raises(UserError, match="tracking.experiment=densenet is deleted"):
        start(c, tmp_path)


def test_trainings_that_start_at_once_on_a_new_file_all_succeed(tmp_path):
    code = f"from pipeline.tracking.run import connect; connect('sqlite:///{tmp_path}/mlflow.db')"
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


def test_a_password_is_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://me:\*\*\*@127.0.0.1:9") as error:
        start(config(tmp_path), tmp_path)
    assert "hunter2" not in str(error.value)


@pytest.mark.slow
def test_a_server_that_is_away_for_a_while_costs_nothing(tmp_path):
    server = MlflowServer(tmp_path)
    try:
        tracker = start(config(tmp_path, uri=server.uri), tmp_path)
        for i in range(3):
            tracker.log({"loss": float(i)}, i)
        server.stop()
        started = time.perf_counter()
        for i in range(3, 30):
            tracker.log({"loss": float(i)}, i)
        assert time.perf_counter() - started < 1, "logging waited for the server"
        server.start()
        assert tracker.finish("FINISHED", timeout_s=PATIENCE_S) == 0
        client = MlflowClient(server.uri)
        assert history(client, tracker.run_id, "loss") == [(i, float(i)) for i in range(30)]
        assert client.get_run(tracker.run_id).info.status == "FINISHED"
        server.stop()
        again = Tracker(client, server.uri, tracker.run_id, tmp_path / "run" / "metrics.jsonl")
        again.log({"loss": 30.0, "lr": 0.1}, 30)
        assert again.finish("FINISHED", timeout_s=0.1) == 2
        assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == 30.0
    finally:
        server.stop()
