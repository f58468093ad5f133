"""A failure of Ray after the run's last checkpoint is a warning; an earlier one is an error."""

from pathlib import Path
from typing import Any

import pytest
import ray.train

from launch.cluster import training
from launch.cluster.allocation import Resources
from launch.cluster.local_ray import embedded_ray
from launch.run.prepare import prepare, read_config
from pipeline.errors import TrainingError
from pipeline.train.events import Event, Warned
from tests.conftest import PROJECT
from tests.train.settings import new_trainer

pytestmark = pytest.mark.slow


def test_a_failure_after_the_last_checkpoint_is_a_warning(tmp_path, one_rank, monkeypatch):
    def fails(trainer: Any) -> None:
        raise ray.train.TrainingFailedError("controller error:\nthe placement group could not be removed")

    monkeypatch.setattr(training.LocalTrainer, "fit", fails)
    few = ["train.epochs=0.1", "schedule.warmup_epochs=0", "cluster.workers=1", "cluster.cpus_per_worker=1"]
    config = read_config(PROJECT / "configs" / "demo.yaml", [*few, "run.name=run", f"run.output={tmp_path}"])
    prepared = prepare(config, Resources("this machine", 2, 0, embedded=True))
    events: list[Event] = []
    with embedded_ray(1, Path(tmp_path, "logs", "ray.log")):
        with pytest.raises(TrainingError, match="the placement group could not be removed"):
            training.run_training(prepared, events.append)
        assert not events
        indexes = prepared.train_index, prepared.val_index
        new_trainer(prepared.config, prepared.derived, indexes, prepared.run_dir, lambda event: None).fit()
        training.run_training(prepared, events.append)
    assert events == [Warned("after the last checkpoint Ray failed: the placement group could not be removed")]
