"""`pipeline.fit`: training in one process, without Ray and MLflow, and with MLflow if it is requested."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from mlflow.tracking import MlflowClient
from PIL import Image

import pipeline
from pipeline.errors import ConfigError, UserError
from pipeline.train.checkpoint import best_checkpoint, verify
from pipeline.train.events import Evaluated, Event, Resumed, Saved, Step, Warned
from tests.conftest import PROJECT

pytestmark = pytest.mark.slow
BLOCKED = """
import json, os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "mlflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import pipeline
from pipeline.train.events import Resumed

tree = json.loads(sys.argv[1])
run = pipeline.fit(pipeline.load_config(tree))
tree["train"]["epochs"] = 2
events = []
again = pipeline.fit(pipeline.load_config(tree), report=events.append)
assert isinstance(again.history[0], type(run.history[0]))
resumed = [event.samples_seen for event in events if isinstance(event, Resumed)]
try:
    pipeline.fit(pipeline.load_config(tree | {"tracking": {"uri": "sqlite:///mlflow.db"}}))
except pipeline.UserError as error:
    refused = str(error)
left = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
values = [run.top1, run.top5, run.loss, str(run.checkpoint), str(run.run_dir), run.model_uri, len(run.history)]
print(json.dumps([values, resumed, refused, left]))
"""


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A small run on twelve images."""
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (36, 36), (40 * i, 200 * label, 50)).save(tmp_path / "set" / split / name / f"{i}.jpg")
    return {
        "run": {"output": str(tmp_path / "out"), "name": "one"},
        "model": {"name": "densenet_tiny"},
        "data": {"root": str(tmp_path / "set"), "image_size": 32},
        "eval": {"resize": 32, "crop": 32},
        "train": {"epochs": 1, "global_batch_size": 4, "log_every_steps": 1},
        "cluster": {"workers": 2, "cpus_per_worker": 1},
        "device": "cpu",
    }


def test_without_ray_and_mlflow(tree, tmp_path):
    command = [sys.executable, "-c", BLOCKED, json.dumps(tree)]
    path = {"PYTHONPATH": str(PROJECT), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (top1, top5, loss, checkpoint, run_dir, uri, num_events), resumed, refused, left = json.loads(lines[-1])
    assert 0 <= top1 <= top5 == 100
    assert loss > 0
    assert (run_dir, uri, num_events) == (str(tmp_path / "out" / "one"), None, 4), "three log lines and an evaluation"
    assert verify(Path(checkpoint)) is None
    assert resumed == [12]
    assert refused.startswith("tracking.uri, tracking.registry_uri or their environment variables name a store")
    assert "package mlflow" in refused
    assert left == []
    assert lines[0] == f"training one in {run_dir}"
    assert lines[1] == "warning: cluster.workers=2 has no effect: pipeline.fit trains in one process"
    assert lines[2].startswith("epoch 0.33/1  step 1/3  loss ")
    assert lines[5].startswith("epoch 1.00: top-1 ")
    assert not (tmp_path / "out" / "mlflow.db").exists()


def test_a_tracked_run_is_recorded_and_registered(tree, tmp_path, one_rank):
    tree["tracking"] = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "fits"}
    events: list[Event] = []
    run = pipeline.fit(pipeline.load_config(tree), report=events.append)
    assert run.model_uri == "models:/densenet_tiny@candidate"
    assert run.history == tuple(event for event in events if isinstance(event, Step | Evaluated))
    assert run.checkpoint == best_checkpoint(run.run_dir) == [e.checkpoint for e in events if isinstance(e, Saved)][-1]
    evaluated = run.history[-1]
    assert isinstance(evaluated, Evaluated)
    assert (run.top1, run.loss) == (evaluated.result.top1, evaluated.result.loss)
    client = MlflowClient(tree["tracking"]["uri"])
    (found,) = client.search_runs([client.get_experiment_by_name("fits").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.metrics["val/top1"] == pytest.approx(run.top1)
    assert found.data.metrics["train/loss"] == pytest.approx(run.history[-2].loss)


def test_a_new_run_resumes_from_another_run_and_bad_input_is_an_error(tree, one_rank, monkeypatch):
    events: list[Event] = []
    first = pipeline.fit(pipeline.load_config(tree), report=events.append)
    tree["run"]["name"], tree["train"]["epochs"] = None, 2
    second = pipeline.fit(pipeline.load_config(tree), resume=first.checkpoint, report=events.append)
    assert second.run_dir.name.startswith("densenet_tiny-")
    assert Resumed(12, first.checkpoint) in events
    assert [event.step for event in second.history if isinstance(event, Step)] == [4, 5, 6]
    assert sum(isinstance(event, Warned) for event in events) == 2, "one about cluster.workers in each run"
    with pytest.raises(UserError, match="there is no valid checkpoint in /nowhere"):
        pipeline.fit(pipeline.load_config(tree), resume="/nowhere")
    with pytest.raises(ConfigError, match="device=cuda needs GPUs, and this machine has none"):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        pipeline.fit(pipeline.load_config(tree | {"device": "cuda"}))
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(UserError, match="trains in one process, and this one is rank 0 of 4"):
        pipeline.fit(pipeline.load_config(tree))
