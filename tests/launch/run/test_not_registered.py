"""A run whose model gives NaN prints a warning, and registers no model."""

import json
import re
from typing import Any

import pytest
from mlflow.tracking import MlflowClient


def strict(text: str) -> Any:
    """Parses JSON; refuses NaN and infinities, which JSON does not allow."""

    def refused(token: str) -> None:
        raise AssertionError(f"{text} contains {token}")

    return json.loads(text, parse_constant=refused)


@pytest.mark.slow
@pytest.mark.long
def test_a_model_that_gives_nan_is_not_registered(shell, tmp_path):
    short = ["train.epochs=0.5", "schedule.warmup_epochs=0", "cluster.workers=1", "optim.lr=1e30"]
    lenient = ["train.on_nan=skip", "train.nan_limit=1000", f"run.output={tmp_path}", "run.name=run"]
    done = shell("densenet", "train", "configs/demo.yaml", *short, *lenient)
    assert done.returncode == 0, done.stdout
    printed = done.stdout
    assert re.search(r"step 10/12  loss [\d.]+  9 steps skipped  lr", printed), printed
    assert re.search(r"step 12/12  loss -  2 steps skipped  lr", printed), printed
    assert "top-1 0/360 = 0.00 %, top-5 0/360 = 0.00 %, NaN or infinities for 360 of 360, loss -" in printed
    assert "warning: the model is not registered: it outputs NaN or infinities for 360 of 360 evaluation" in printed
    assert re.search(r"^model +not registered$", printed, re.MULTILINE)
    assert len(re.findall("^warning: the training loss is NaN or infinite", printed, re.MULTILINE)) == 1
    assert "warning: 10 more like this, in the workers' logs: the training loss is NaN or infinite at step 2" in printed
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.search_model_versions() == []
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert strict((checkpoint / "model.json").read_text())["metrics"]["loss"] is None
    assert strict((checkpoint / "state.json").read_text())["best"]["non_finite"] == 360
    run = tmp_path / "run"
    texts = [(run / name).read_text() for name in ("checkpoints.json", "samples.json", "mlflow_run.json")]
    for text in texts + (run / "tracking.jsonl").read_text().splitlines():
        strict(text)
