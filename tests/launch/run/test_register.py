"""`densenet models register` registers a finished run's model after a failed registration."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient

from pipeline.config import RunConfig
from pipeline.tracking.run import Tracker
from pipeline.train.checkpoint import checkpoint_root, commit, folder_name, partial_folder
from tests.models import write_model


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run whose model is not registered; its config has the alias `latest`, which is refused."""
    config = RunConfig.model_validate({"run": {"output": str(tmp_path), "name": "one"}})
    folder = tmp_path / "one"
    with Tracker(config, folder, "one", print) as tracker:
        tracker.set_tags({"data.train.fingerprint": "f00d"})
    checkpoint = checkpoint_root(folder) / folder_name(123)
    write_model(partial_folder(checkpoint), name="densenet_tiny")
    (partial_folder(checkpoint) / "state.json").write_text(json.dumps({"best_at": 123}))
    commit(checkpoint)
    tree = config.model_dump(mode="json")
    tree["tracking"]["alias"], tree["model"]["name"] = "latest", "densenet_tiny"
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_a_finished_run_is_registered_once(run_dir, densenet):
    code, printed = densenet("models", "register", run_dir)
    assert code == 2
    assert "is reserved by MLflow" in printed
    for bad, message in {
        ("--alias", "v1"): "is reserved by MLflow",
        ("--as", "a:b"): "must not be blank",
        ("--registry-uri", "carrier-pigeon://x"): "does not support stores like",
    }.items():
        code, printed = densenet("models", "register", run_dir, "--alias", "candidate", *bad)
        assert code == 2
        assert message in printed, printed
    code, printed = densenet("models", "register", run_dir, "--alias", "candidate")
    assert code == 0, printed
    uri = f"sqlite:///{run_dir.parent}/mlflow.db"
    assert f"densenet_tiny version 1 in {uri}, alias candidate (models:/densenet_tiny@candidate)" in printed
    code, printed = densenet("models", "register", run_dir, "--alias", "champion")
    assert code == 0, printed
    client = MlflowClient(uri, uri)
    (version,) = client.search_model_versions("name='densenet_tiny'")
    assert (version.tags["data.fingerprint"], version.tags["checkpoint"]) == ("f00d", folder_name(123))
    found = client.get_registered_model("densenet_tiny").aliases
    assert {alias: str(number) for alias, number in found.items()} == {"candidate": "1", "champion": "1"}

    other = f"sqlite:///{run_dir.parent}/other.db"
    code, printed = densenet("models", "register", run_dir, "--as", "mine", "--alias", "best", "--registry-uri", other)
    assert code == 0, printed
    assert f"mine version 1 in {other}" in printed
    assert "alias: latest" in (run_dir / "config.yaml").read_text(), "the run's own"
    assert str(MlflowClient(uri, other).get_model_version_by_alias("mine", "best").run_id) == version.run_id


def test_the_registry_of_the_training_environment_is_used_later(run_dir, densenet, monkeypatch):
    other = f"sqlite:///{run_dir.parent}/other.db"
    config = RunConfig.model_validate({"run": {"output": str(run_dir.parent), "name": "one"}})
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_REGISTRY_URI", other)
        with Tracker(config, run_dir, "one", print):
            pass
    code, printed = densenet("models", "register", run_dir, "--alias", "candidate")
    assert code == 0, printed
    assert f"densenet_tiny version 1 in {other}" in printed


def test_folders_without_a_run_or_checkpoint_are_refused(run_dir, densenet, tmp_path):
    code, printed = densenet("models", "register", tmp_path / "gone")
    assert code == 2
    assert "is not a run folder: it has no config.yaml" in printed
    shutil.rmtree(checkpoint_root(run_dir))
    code, printed = densenet("models", "register", run_dir, "--alias", "candidate")
    assert code == 2
    assert "has no checkpoint to register: train the run first" in printed


def test_an_unreachable_registry_names_the_command(run_dir, densenet):
    unreachable = ("--registry-uri", "http://127.0.0.1:9", "--timeout", 0)
    code, printed = densenet("models", "register", run_dir, "--alias", "candidate", *unreachable)
    assert code == 2
    assert "the MLflow store at http://127.0.0.1:9 is unreachable" in printed
    assert f"`densenet models register {run_dir}` registers it without training again" in printed
