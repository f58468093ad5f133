"""Finding the checkpoint to resume from: by checkpoint folder, run folder or MLflow run id."""

from pathlib import Path

import pytest
from PIL import Image

from launch.cluster.allocation import Resources
from launch.run.prepare import prepare, read_config
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking.run import Tracker
from pipeline.train import checkpoint
from pipeline.train.checkpoint import checkpoint_root
from pipeline.train.warm_start import find_checkpoint
from tests.train.settings import new_trainer

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
RESOURCES = Resources("this machine", 1, 0, embedded=True)


@pytest.fixture
def config(tmp_path) -> RunConfig:
    """The config of a run on eight images."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 40), (60 * i, 9, 50)).save(tmp_path / "set" / split / name / f"{i}.jpg")
    return configured(tmp_path, "first")


def configured(folder: Path, name: str) -> RunConfig:
    small = ["train.global_batch_size=4", "train.epochs=2", "cluster.workers=1", "device=cpu"]
    paths = [f"data.root={folder / 'set'}", f"run.output={folder / 'out'}", f"run.name={name}"]
    return read_config(DEMO, [*small, *paths])


def trained(config: RunConfig) -> Path:
    """Trains the run; returns its folder."""
    prepared = prepare(config, RESOURCES)
    indexes = prepared.train_index, prepared.val_index
    new_trainer(config, prepared.derived, indexes, prepared.run_dir, lambda event: None).fit()
    return prepared.run_dir


def test_a_new_run_resumes_from_another_runs_checkpoint(config, one_rank, tmp_path):
    run_dir = trained(config)
    older, latest = checkpoint.checkpoints(checkpoint_root(run_dir))
    second = configured(tmp_path, "second")
    assert find_checkpoint(str(older), second) == older
    assert find_checkpoint(str(run_dir), second) == latest
    with Tracker(config, run_dir, "first", print) as tracker:
        tracker.log_params(config.model_dump(mode="json"))
    assert find_checkpoint(tracker.run_id, second) == latest
    assert prepare(second, RESOURCES, str(older)).resume == older
    assert prepare(second, RESOURCES, "auto").resume is None

    other = second.model_copy(update={"model": second.model.model_copy(update={"name": "densenet121"})})
    with pytest.raises(UserError, match="model.name was densenet_tiny and is densenet121"):
        prepare(other, RESOURCES, str(older))

    (latest / "model.json").unlink()
    assert find_checkpoint(str(run_dir), second) == older
    with pytest.raises(UserError, match=r"is corrupt: model.json is missing"):
        find_checkpoint(str(latest), second)
    with pytest.raises(UserError, match="the run first has checkpoints of its own, and resumes from its latest"):
        find_checkpoint(str(older), config)


def test_a_missing_checkpoint_is_an_error(config, tmp_path):
    with pytest.raises(UserError, match=r"--resume=/nowhere: there is no valid checkpoint in /nowhere"):
        find_checkpoint("/nowhere", config)
    with pytest.raises(UserError, match=r"has no training run with the id 0+"):
        find_checkpoint("0" * 32, config)
