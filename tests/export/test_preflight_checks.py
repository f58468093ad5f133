"""Checks at the start of what the end of a run needs: disk space, registry, artifact store, checkpoint storage."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from launch.cluster.allocation import Resources
from launch.cluster.prepared_run import PreparedRun
from launch.run.prepare import prepare, read_config
from pipeline.errors import UserError
from pipeline.export.registration import check_registry
from pipeline.tracking.run import Tracker
from pipeline.train.disk_space import check_disk_space, checkpoint_bytes, kept_checkpoints

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
HERE = Resources("this machine", 1, 0, embedded=True)


@pytest.fixture
def prepared(tmp_path):
    """`prepared(*overrides)` prepares a run on four images."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 40), (60 * i, 9, 50)).save(tmp_path / "set" / split / name / f"{i}.jpg")

    def prepare_run(*overrides: str) -> PreparedRun:
        paths = [f"data.root={tmp_path / 'set'}", f"run.output={tmp_path / 'out'}", "run.name=one"]
        small = ["train.global_batch_size=4", "cluster.workers=1", "device=cpu"]
        return prepare(read_config(DEMO, [*paths, *small, *overrides]), HERE)

    return prepare_run


def test_too_little_disk_space_for_the_checkpoints_is_rejected(prepared, monkeypatch):
    """Replaces `shutil.disk_usage`, since a test cannot fill the disk."""
    run = prepared("model.name=densenet121", "train.epochs=10", "schedule.warmup_epochs=0", "optim.name=adamw")
    parameters = 6_955_906  # of DenseNet-121 with two classes
    assert checkpoint_bytes(run.config, parameters) == 4 * 3 * parameters
    assert kept_checkpoints(run.config) == 4
    check_disk_space(run)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 7 * 10**8, 3 * 10**8))
    with pytest.raises(UserError, match=r"has 300.0 MB free, this run needs about 3\d\d.\d MB there: 4 checkpoints"):
        check_disk_space(run)


def test_a_registry_that_rejects_the_model_is_reported_at_the_start(prepared, tmp_path):
    run = prepared(f"tracking.registry_uri=sqlite:///{tmp_path}/other.db", "tracking.registered_model_name=mine")
    warnings: list[str] = []
    check_registry(run.config, warnings.append)
    client = MlflowClient(f"sqlite:///{tmp_path}/other.db", f"sqlite:///{tmp_path}/other.db")
    assert [model.name for model in client.search_registered_models()] == ["mine"]
    client.register_prompt("question", "why?")
    with pytest.raises(UserError, match=r"question is the name of a prompt in .*: set tracking.registered_model_name"):
        check_registry(
            prepared(
                f"tracking.registry_uri=sqlite:///{tmp_path}/other.db", "tracking.registered_model_name=question"
            ).config,
            warnings.append,
        )
    unreachable = "tracking.registry_uri=http://127.0.0.1:9"
    with pytest.raises(UserError, match="the MLflow store at http://127.0.0.1:9 is unreachable"):
        check_registry(prepared(unreachable).config, warnings.append)
    assert not warnings
    check_registry(prepared(unreachable, "tracking.on_unreachable=spool").config, warnings.append)
    assert "The registry at http://127.0.0.1:9 is needed at the end of the run" in warnings[0]


def test_an_artifact_store_that_rejects_files_is_reported_at_the_start(prepared, tmp_path):
    config = prepared().config
    with Tracker(config, tmp_path / "out" / "one", "one", print) as tracker:
        file = tmp_path / "notes.txt"
        file.write_text("hello")
        tracker.check_store(file)
        shutil.rmtree(tmp_path / "out" / "mlartifacts")
        (tmp_path / "out" / "mlartifacts").write_text("in the way")
        with pytest.raises(UserError, match=r"the artifact store of sqlite:///.*, file://.*, rejects files: "):
            tracker.check_store(file)


def test_a_checkpoint_storage_that_is_not_writable_is_rejected(prepared, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"checkpoint.storage=.*/file"):
        prepared(f"checkpoint.storage={tmp_path / 'file'}")
    prepared(f"checkpoint.storage={tmp_path / 'second'}")
    assert [file for file in (tmp_path / "second").rglob("*") if file.is_file()] == []
