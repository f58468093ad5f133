"""What the end of a run needs is tried at its start: room on the disk, registry, artifact store, second storage."""

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
    """`prepared(*overrides)` is a run that is ready, on four images."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 40), (60 * i, 9, 50)).save(tmp_path / "set" / split / name / f"{i}.jpg")

    def make(*overrides: str) -> PreparedRun:
        places = [f"data.root={tmp_path / 'set'}", f"run.output={tmp_path / 'out'}", "run.name=one"]
        small = ["train.global_batch_size=4", "cluster.workers=1", "device=cpu"]
        return prepare(read_config(DEMO, [*places, *small, *overrides]), HERE)

    return make


def test_a_disk_without_room_for_the_checkpoints_is_refused(prepared, monkeypatch):
    """A full disk cannot be had in a test: what it says of itself is replaced."""
    run = prepared("model.name=densenet121", "train.epochs=10", "schedule.warmup_epochs=0", "optim.name=adamw")
    parameters = 6_955_906  # of DenseNet-121 with two classes
    assert checkpoint_bytes(run.config, parameters) == 4 * 3 * parameters
    assert kept_checkpoints(run.config) == 4
    check_disk_space(run)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 7 * 10**8, 3 * 10**8))
    with pytest.raises(UserError, match=r"has 300.0 MB free, this run needs about 3\d\d.\d MB there: 4 checkpoints"):
        check_disk_space(run)


def test_a_registry_that_will_not_take_the_model_is_refused(prepared, tmp_path):
    run = prepared(f"tracking.registry_uri=sqlite:///{tmp_path}/other.db", "tracking.registered_model_name=mine")
    told: list[str] = []
    check_registry(run.config, told.append)
    client = MlflowClient(f"sqlite:///{tmp_path}/other.db", f"sqlite:///{tmp_path}/other.db")
    assert [model.name for model in client.search_registered_models()] == ["mine"]
    client.register_prompt("question", "why?")
    with pytest.raises(UserError, match=r"question is the name of a prompt in .*: set tracking.registered_model_name"):
        check_registry(
            prepared(
                f"tracking.registry_uri=sqlite:///{tmp_path}/other.db", "tracking.registered_model_name=question"
            ).config,
            told.append,
        )
    away = "tracking.registry_uri=http://127.0.0.1:9"
    with pytest.raises(UserError, match="no MLflow store answers at http://127.0.0.1:9"):
        check_registry(prepared(away).config, told.append)
    assert not told
    check_registry(prepared(away, "tracking.on_unreachable=spool").config, told.append)
    assert "The registry at http://127.0.0.1:9 is needed at the end of the run" in told[0]


def test_an_artifact_store_that_takes_no_files_is_refused(prepared, tmp_path):
    config = prepared().config
    with Tracker(config, tmp_path / "out" / "one", "one", print) as tracker:
        file = tmp_path / "notes.txt"
        file.write_text("hello")
        tracker.check_store(file)
        shutil.rmtree(tmp_path / "out" / "mlartifacts")
        (tmp_path / "out" / "mlartifacts").write_text("in the way")
        with pytest.raises(UserError, match=r"the artifact store of sqlite:///.*, file://.*, takes no files: "):
            tracker.check_store(file)


def test_a_second_storage_that_cannot_be_written_is_refused(prepared, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"checkpoint.storage=.*/file"):
        prepared(f"checkpoint.storage={tmp_path / 'file'}")
    prepared(f"checkpoint.storage={tmp_path / 'second'}")
    assert [file for file in (tmp_path / "second").rglob("*") if file.is_file()] == []
