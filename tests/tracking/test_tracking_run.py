"""One MLflow run: logging, resumed runs, limits, a server that is unreachable for a while."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow_sink import STATE
from pipeline.tracking.run import JOURNAL, Tracker
from pipeline.tracking.stores import stores_from_config
from tests.servers import PATIENCE_S, MlflowServer


def config(tmp_path: Path, **tracking: str) -> RunConfig:
    return RunConfig.model_validate({"run": {"output": str(tmp_path)}, "tracking": tracking})


def start(config: RunConfig, tmp_path: Path, warn=print) -> Tracker:
    return Tracker(config, tmp_path / "run", "one", warn)


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_a_run_has_everything_that_was_logged_with_samples_seen_as_step(tmp_path):
    c = config(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "more.txt").write_text("more")
    with start(c, tmp_path) as tracker:
        tracker.log_params(c.model_dump(mode="json") | {"derived": {"workers": 2}})
        tracker.set_tags({"eval.transform": c.eval.description})
        tracker.log_artifact(tmp_path / "notes.txt", "texts")
        tracker.log_artifact(tmp_path / "more.txt", "texts")
        tracker.log_dataset("validation", "digits/val", "beef" * 16, "/data/digits", {"images": 360})
        tracker.log_artifact(tmp_path / "run" / JOURNAL)
        tracker.log_dataset("training", "digits/train", "f00d" * 16, "/data/digits", {"images": 1437})
        for i in range(5):
            tracker.log_metrics({"train/loss": 1 / (i + 1), "train/lr": 0.1}, samples_seen=64 * i)
    assert tracker.unsent == 0
    client = MlflowClient(stores_from_config(c).tracking)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "one"
    assert run.data.params["optim.lr"] == "0.1"
    assert run.data.params["derived.workers"] == "2"
    assert run.data.tags["eval.transform"].startswith("resize 256")
    read = {(of.dataset.name, of.dataset.digest): of.tags for of in run.inputs.dataset_inputs}
    assert set(read) == {("digits/train", "f00d" * 9), ("digits/val", "beef" * 9)}
    tags = read["digits/train", "f00d" * 9]
    assert [(tag.key, tag.value) for tag in tags] == [("mlflow.data.context", "training")]
    assert sorted(file.path for file in client.list_artifacts(tracker.run_id)) == ["texts", JOURNAL]
    assert history(client, tracker.run_id, "train/loss") == [(64 * i, 1 / (i + 1)) for i in range(5)]
    artifact = client.download_artifacts(tracker.run_id, "texts/notes.txt", str(tmp_path))
    assert Path(artifact).read_text() == "hello"
    assert len(client.list_artifacts(tracker.run_id, "texts")) == 2


def test_a_resumed_run_stays_one_mlflow_run_and_tags_changed_parameters(tmp_path):
    c = config(tmp_path)
    with pytest.raises(RuntimeError), start(c, tmp_path) as first:
        first.log_params({"derived": {"workers": 2}})
        first.log_metrics({"loss": 1.0}, 10)
        raise RuntimeError
    client = MlflowClient(stores_from_config(c).tracking)
    assert client.get_run(first.run_id).info.status == "FAILED"
    with pytest.raises(SystemExit), start(c, tmp_path) as second:
        assert second.run_id == first.run_id
        second.log_params({"derived": {"workers": 4}})
        second.log_metrics({"loss": 0.5}, 20)
        assert second.flush(PATIENCE_S)
        assert client.get_run(first.run_id).info.status == "RUNNING"
        raise SystemExit(143)
    run = client.get_run(first.run_id)
    assert run.info.status == "KILLED"
    assert run.data.params["derived.workers"] == "2"
    assert run.data.tags["changed.derived.workers"] == "4"
    assert history(client, first.run_id, "loss") == [(10, 1.0), (20, 0.5)]


def test_records_that_are_sent_twice_are_stored_once(tmp_path):
    """A driver that dies between sending records and saving the offset sends them again."""
    c = config(tmp_path)
    with start(c, tmp_path) as first:
        first.log_metrics({"loss": 1.0}, 10)
        first.log_metrics({"loss": 0.5}, 20)
    state = json.loads((tmp_path / "run" / STATE).read_text())
    (tmp_path / "run" / STATE).write_text(json.dumps(state | {"sent": 0}))
    with start(c, tmp_path) as second:
        second.log_metrics({"loss": 0.2}, 30)
    assert history(MlflowClient(stores_from_config(c).tracking), first.run_id, "loss") == [
        (10, 1.0),
        (20, 0.5),
        (30, 0.2),
    ]


def test_a_truncated_record_is_dropped_and_a_full_disk_causes_one_warning(tmp_path, monkeypatch):
    warnings: list[str] = []
    journal = Journal(tmp_path / JOURNAL, warnings.append)
    journal.append("tags", values={"a": "1"})
    with (tmp_path / JOURNAL).open("a") as stream:
        stream.write('{"kind": "tags", "val')
    journal = Journal(tmp_path / JOURNAL, warnings.append)
    journal.append("tags", values={"b": "2"})
    assert [record["values"] for record in journal.records()] == [{"a": "1"}, {"b": "2"}]
    journal.file = Path("/dev/full/none")
    journal.append("tags", values={"c": "3"})
    journal.append("tags", values={"d": "4"})
    assert len(warnings) == 1
    assert "records of this run are lost until then" in warnings[0]


def test_batches_above_mlflows_limits_and_a_long_parameter(tmp_path):
    c = config(tmp_path)
    with start(c, tmp_path) as tracker:
        tracker.log_params({"long": "x" * 10_000, **{f"p{i}": i for i in range(250)}})
        tracker.set_tags({f"t{i}": "x" for i in range(250)})
        tracker.log_metrics({f"m{i}": float(i) for i in range(2500)}, 1)
    assert tracker.unsent == 0
    run = MlflowClient(stores_from_config(c).tracking).get_run(tracker.run_id)
    assert len(run.data.metrics) == 2500
    assert len(run.data.params) == 251
    assert sum(key.startswith("t") for key in run.data.tags) == 250
    assert len(run.data.params["long"]) == 6000


def test_a_rejected_artifact_causes_a_warning_and_blocks_nothing(tmp_path):
    c, warnings = config(tmp_path), []
    with start(c, tmp_path, warnings.append) as tracker:
        tracker.log_artifact(tmp_path / "gone.txt")
        tracker.log_metrics({"loss": 1.0}, 1)
    assert tracker.unsent == 0
    assert history(MlflowClient(stores_from_config(c).tracking), tracker.run_id, "loss") == [(1, 1.0)]
    assert any("gone.txt was not stored with the run in MLflow" in text for text in warnings)


def test_an_unsupported_store_and_a_deleted_experiment_are_rejected(tmp_path):
    for uri, message in {
        "carrier-pigeon://x": "does not support stores like carrier-pigeon://x",
        "mysql://127.0.0.1:1/x": r"needs a database driver that is not installed \(No module named 'MySQLdb'\)",
    }.items():
        with pytest.raises(UserError, match=message):
            start(config(tmp_path, uri=uri, on_unreachable="spool"), tmp_path)
    with pytest.raises(UserError, match=r"database at postgresql://127.0.0.1:1/x is unreachable: .*onnection refused"):
        start(config(tmp_path, uri="postgresql://127.0.0.1:1/x"), tmp_path)
    c = config(tmp_path)
    with start(c, tmp_path):
        pass
    client = MlflowClient(stores_from_config(c).tracking)
    client.delete_experiment(client.get_experiment_by_name("densenet").experiment_id)
    with pytest.raises(UserError, match="tracking.experiment=densenet is deleted"):
        Tracker(c, tmp_path / "other", "other", print)


def test_a_deleted_run_and_a_run_in_another_store_are_reported_with_a_fix(tmp_path):
    c = config(tmp_path)
    with start(c, tmp_path) as tracker:
        tracker.log_metrics({"loss": 1.0}, 10)
    MlflowClient(stores_from_config(c).tracking).delete_run(tracker.run_id)
    with pytest.raises(
        UserError, match=f"is deleted .*restore it with `mlflow runs restore --run-id {tracker.run_id}`"
    ):
        start(c, tmp_path)
    elsewhere = config(tmp_path, uri=f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(UserError, match=rf"has no run {tracker.run_id}, which .* remove .*{STATE} to send all records"):
        start(elsewhere, tmp_path)
    (tmp_path / "run" / STATE).unlink()
    with start(elsewhere, tmp_path) as again:
        assert again.flush(PATIENCE_S)
    assert history(MlflowClient(elsewhere.tracking.uri), again.run_id, "loss") == [(10, 1.0)]


def test_concurrent_runs_can_create_the_same_sqlite_store(tmp_path):
    code = f"from pipeline.tracking.client import connect; connect('sqlite:///{tmp_path}/mlflow.db')"
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


def test_a_password_is_never_printed_or_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://me:\*\*\*@127.0.0.1:9") as error:
        start(config(tmp_path), tmp_path)
    assert "hunter2" not in str(error.value)
    with start(config(tmp_path, on_unreachable="spool"), tmp_path) as tracker:
        tracker.close(0)
    assert all(b"hunter2" not in file.read_bytes() for file in (tmp_path / "run").iterdir())


@pytest.mark.slow
def test_no_record_is_lost_while_the_server_is_unreachable(tmp_path, densenet):
    server = MlflowServer(tmp_path)
    try:
        warnings: list[str] = []
        tracker = start(config(tmp_path, uri=server.uri), tmp_path)
        for i in range(3):
            tracker.log_metrics({"loss": float(i)}, i)
        server.stop()
        for i in range(3, 30):
            tracker.log_metrics({"loss": float(i)}, i)  # the server comes back only after it
        server.start()
        tracker.finish("FINISHED", timeout_s=PATIENCE_S)
        assert tracker.unsent == 0
        client = MlflowClient(server.uri)
        assert history(client, tracker.run_id, "loss") == [(i, float(i)) for i in range(30)]
        assert client.get_run(tracker.run_id).info.status == "FINISHED"

        server.stop()
        with pytest.raises(UserError, match="the MLflow store at .* is unreachable"):
            start(config(tmp_path, uri=server.uri), tmp_path)
        spooling = config(tmp_path / "spooled", uri=server.uri, on_unreachable="spool")
        spooled = start(spooling, tmp_path / "spooled", warnings.append)
        assert spooled.run_id is None
        assert "Records stay in" in warnings[0]
        spooled.log_metrics({"loss": 30.0, "lr": 0.1}, 30)
        spooled.finish("FINISHED", timeout_s=0.1)
        assert spooled.unsent == 3
        (tmp_path / "spooled" / "run" / "config.yaml").write_text(spooling.to_yaml())
        code, printed = densenet("runs", "sync", tmp_path / "spooled" / "run", "--timeout", 0)
        assert code == 2
        assert "is unreachable" in printed
        server.start()
        code, printed = densenet("runs", "sync", tmp_path / "spooled" / "run")
        assert code == 0, printed
        run_id = json.loads((tmp_path / "spooled" / "run" / STATE).read_text())["run_id"]
        assert history(client, run_id, "loss") == [(30, 30.0)]
        assert client.get_run(run_id).info.status == "FINISHED"
    finally:
        server.stop()
