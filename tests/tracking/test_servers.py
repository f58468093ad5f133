"""MLflow servers in team setups: PostgreSQL, S3 artifacts proxied by the server, concurrent runs, authentication."""

import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from mlflow.tracking import MlflowClient

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.export.package import register
from pipeline.tracking.client import connect
from pipeline.tracking.queries import metric_history, read_artifact
from pipeline.tracking.run import Tracker
from pipeline.tracking.stores import Stores
from pipeline.train.model_source import resolve_model
from tests.models import write_model
from tests.servers import PATIENCE_S, MlflowServer, postgres, s3_store

pytestmark = [pytest.mark.slow, pytest.mark.long]
RECORDS = 150


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """A server on PostgreSQL that proxies artifacts to an S3 store; clients have no S3 credentials."""
    with postgres(tmp_path) as backend, s3_store(monkeypatch):
        started = MlflowServer(tmp_path, backend, ["--artifacts-destination", "s3://bucket/artifacts"])
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        try:
            yield started
        finally:
            started.stop()


def start_tracker(tmp_path: Path, uri: str, name: str, warn=print) -> Tracker:
    config = RunConfig.model_validate({"run": {"output": str(tmp_path), "name": name}, "tracking": {"uri": uri}})
    return Tracker(config, tmp_path / name, name, warn)


def test_concurrent_runs_survive_a_server_restart_and_models_are_stored_in_s3(server, tmp_path):
    half = threading.Barrier(3)
    ids: dict[str, str] = {}

    def train(name: str) -> None:
        with start_tracker(tmp_path, server.uri, name) as tracker:
            ids[name] = str(tracker.run_id)
            tracker.log_artifact(write_model(tmp_path / f"model-{name}") / "model.json")
            for i in range(RECORDS):
                if i == RECORDS // 2:
                    half.wait(PATIENCE_S)
                tracker.log_metrics({"train/loss": float(i), "train/lr": 0.1}, i)
            assert tracker.flush(PATIENCE_S)

    threads = [threading.Thread(target=train, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    half.wait(PATIENCE_S)
    server.stop()
    server.start()
    for thread in threads:
        thread.join()
    client = connect(server.uri)
    for run_id in ids.values():
        points = metric_history(server.uri, run_id, ["train/loss"])["train/loss"]
        assert points == [(i, float(i)) for i in range(RECORDS)]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert "densenet_tiny" in str(read_artifact(server.uri, run_id, "model.json"))

    names = {"name": "tiny", "alias": "candidate", "data_fingerprint": "f00d"}
    register(tmp_path / "model-one", stores=Stores(server.uri, server.uri), run_id=ids["one"], **names)
    for model_uri in ("models:/tiny@candidate", f"runs:/{ids['one']}/model"):
        folder = resolve_model(model_uri, "MODEL", tmp_path / "cache", Stores(server.uri, server.uri))
        assert (folder / "model.safetensors").read_bytes() == (tmp_path / "model-one/model.safetensors").read_bytes()


def test_a_failing_artifact_store_causes_a_warning_and_metrics_are_stored(server, tmp_path, monkeypatch):
    warnings: list[str] = []
    with start_tracker(tmp_path, server.uri, "one", warnings.append) as tracker:
        assert tracker.flush(PATIENCE_S)
        delete_bucket(server, monkeypatch)
        model = write_model(tmp_path / "model")
        tracker.log_artifact(model / "model.json")
        tracker.log_metrics({"train/loss": 1.0}, 1)
        assert tracker.flush(PATIENCE_S)
        with pytest.raises(UserError, match=r"the model could not be registered in .* The checkpoint is .*/model"):
            names = {"name": "tiny", "alias": "a", "data_fingerprint": "f00d"}
            register(model, stores=tracker.stores, run_id=str(tracker.run_id), **names)
    assert any("model.json was not stored with the run in MLflow" in text for text in warnings), warnings
    assert metric_history(server.uri, str(tracker.run_id), ["train/loss"]) == {"train/loss": [(1, 1.0)]}


def delete_bucket(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, server.env[name])
        fsspec.filesystem("s3", skip_instance_cache=True).rm("bucket", recursive=True)


def test_denied_access_names_the_authentication_variables(tmp_path, monkeypatch):
    secrets = {"MLFLOW_FLASK_SERVER_SECRET_KEY": "x" * 32, "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini")}
    (tmp_path / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\nadmin_password = a-long-password\n"
        f"database_uri = sqlite:///{tmp_path}/auth.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    server = MlflowServer(tmp_path, options=["--app-name", "basic-auth"], env=secrets)
    try:
        with pytest.raises(UserError, match="denies access: .* Set MLFLOW_TRACKING_USERNAME and"):
            connect(server.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
        with start_tracker(tmp_path, server.uri, "one") as tracker:
            tracker.log_metrics({"loss": 1.0}, 1)
        assert tracker.unsent == 0
        assert MlflowClient(server.uri).get_run(str(tracker.run_id)).info.status == "FINISHED"
        files = [file for file in (tmp_path / "one").rglob("*") if file.is_file()]
        assert all(b"a-long-password" not in file.read_bytes() for file in files)
    finally:
        server.stop()


def test_a_host_name_that_the_server_does_not_allow_is_reported(tmp_path):
    server = MlflowServer(tmp_path, options=["--allowed-hosts", "mlflow.example"])
    try:
        with pytest.raises(UserError, match=r"Invalid Host header.* start the server with --allowed-hosts"):
            connect(server.uri)
    finally:
        server.stop()
