"""Nets of timm that are no DenseNets: trained, gone on with, evaluated, exported and used as DenseNets are."""

import json

import pytest

from pipeline.model.sources import read_card
from pipeline.train.checkpoint import checkpoint_root, checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("name", ["resnet50", "rdnet_tiny"])
def test_they_train_the_demo_go_on_and_predict(name, densenet, tmp_path):
    options = [f"model.name={name}", "optim.lr=0.01", "schedule.warmup_epochs=0", "cluster.workers=1"]
    code, told = densenet("train", "demo", *options, "train.epochs=0.08", "run.name=first")
    assert code == 0, told
    assert f"{name} version 1, alias candidate" in told
    first = checkpoints(checkpoint_root(tmp_path / "outputs" / "first"))[-1]
    assert read_card(first)["architecture"] == {"timm": name}

    code, told = densenet("train", "demo", *options, "train.epochs=0.12", "run.name=second", "--resume", str(first))
    assert code == 0, told
    assert "step 3/3" in told
    second = checkpoints(checkpoint_root(tmp_path / "outputs" / "second"))[-1]
    measured = read_card(second)["metrics"]

    digits = tmp_path / "outputs" / "data" / "digits"
    code, told = densenet("evaluate", str(second), "--data", str(digits), "--json")
    assert code == 0, told
    scores = json.loads(told)
    assert [scores["top1_correct"], scores["total"]] == [measured["top1_correct"], measured["total"]]

    picture = min((digits / "val").glob("3/*.jpg"))
    code, told = densenet("predict", f"models:/{name}@candidate", str(picture), "--json")
    assert code == 0, told
    code, told = densenet("export", str(second), "--to", "timm", "--out", "exported")
    assert code == 0, told
    assert json.loads((tmp_path / "exported" / "timm" / "config.json").read_text())["architecture"] == name
