"""Other timm models than DenseNets: training, resuming, evaluation, export and prediction."""

import json

import pytest

from pipeline.model.card import ModelCard
from pipeline.train.checkpoint import checkpoint_root, checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(2400)]


@pytest.mark.parametrize("name", ["resnet50", "rdnet_tiny"])
def test_a_model_trains_resumes_and_predicts(name, shell, densenet, tmp_path):
    output = tmp_path / "outputs"
    options = [f"model.name={name}", "optim.lr=0.01", "schedule.warmup_epochs=0", "cluster.workers=1"]
    options.append(f"run.output={output}")
    done = shell("densenet", "train", "demo", *options, "train.epochs=0.08", "run.name=first")
    assert f"{name} version 1, alias candidate" in done.stdout, done.stdout
    first = checkpoints(checkpoint_root(output / "first"))[-1]
    assert ModelCard.read(first).architecture == {"timm": name}

    done = shell("densenet", "train", "demo", *options, "train.epochs=0.12", "run.name=second", "--resume", str(first))
    assert done.returncode == 0, done.stdout
    assert "step 3/3" in done.stdout
    second = checkpoints(checkpoint_root(output / "second"))[-1]
    measured = ModelCard.read(second).metrics

    digits = output / "data" / "digits"
    code, printed = densenet("eval", second, "--data", digits, "--json")
    assert code == 0, printed
    scores = json.loads(printed)["scores"]["plain"]
    assert [scores["top1_correct"], scores["total"]] == [measured["top1_correct"], measured["total"]]

    code, printed = densenet("predict", f"models:/{name}@candidate", min(digits.glob("val/3/*.jpg")), "--json")
    assert code == 0, printed
    code, printed = densenet("export", second, "--to", "timm", "--out", "exported")
    assert code == 0, printed
    assert json.loads((tmp_path / "exported" / "timm" / "config.json").read_text())["architecture"] == name
