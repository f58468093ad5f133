"""Model promotion: a better model passes the gate, a worse one does not, evidence is stored, rollback works."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline.data.dataset import open_split
from pipeline.evaluation.mcnemar import mcnemar_test
from pipeline.evaluation.probabilities import model_probabilities
from pipeline.export.package import register
from tests.models import CLASSES, make_outputs_nan, start_run, write_model

IMAGES = 24


def test_mcnemars_test_by_hand():
    """Of ten images that only one model predicts correctly, nine are the new model's: p = (10 + 1) / 2^10."""
    new_correct_N = np.array([True] * 9 + [False] + [True] * 5 + [False] * 5)
    old_correct_N = np.array([False] * 9 + [True] + [True] * 5 + [False] * 5)
    paired = mcnemar_test(new_correct_N, old_correct_N)
    assert (paired.total, paired.new, paired.old, paired.only_new, paired.only_old) == (20, 14, 6, 9, 1)
    assert paired.gain == pytest.approx(40)
    assert paired.p_value == pytest.approx(11 / 1024)
    assert mcnemar_test(new_correct_N, new_correct_N).p_value == 1


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Versions 1 and 2 of a model, and images whose labels are the predictions of version 2."""
    folder = tmp_path_factory.mktemp("registry")
    with start_run(folder) as tracker:
        for seed in (1, 2):
            checkpoint = write_model(folder / f"checkpoint{seed}", seed=seed, metrics=None)
            names = {"run_id": tracker.run_id, "name": "tiny", "alias": "candidate", "data_fingerprint": "f00d"}
            register(checkpoint, stores=tracker.stores, **names)

    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        file = folder / "unsorted" / "val" / "any" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), np.uint8)).resize((60, 50)).save(file)
    index = open_split(folder / "unsorted", "val", folder / "index")
    probabilities_NK, _ = model_probabilities(folder / "checkpoint2", index)
    for i, label in enumerate(probabilities_NK.argmax(axis=1)):
        source, target = index.path(i), folder / "set" / "val" / CLASSES[label] / index.path(i).name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return tracker.uri, folder / "set"


@pytest.fixture
def models(registry, densenet) -> Callable[..., tuple[int, str]]:
    """`models(*arguments)` runs `densenet models` on the registry."""
    return lambda *arguments: densenet("models", *arguments, "--uri", registry[0])


@pytest.mark.slow
def test_promotion_from_the_first_champion_to_a_rollback(registry, models):
    uri, data = registry
    client = MlflowClient(uri, uri)

    def champion() -> str:
        return str(client.get_model_version_by_alias("tiny", "champion").version)

    code, printed = models("promote", "models:/tiny/1", "--data", data)
    assert code == 0, printed
    assert "champion has no version yet" in printed
    assert champion() == "1"

    code, printed = models("promote", "tiny@candidate", "--data", data, "--dry-run")
    assert code == 0, printed
    assert f"version 2         top-1 {IMAGES}/{IMAGES} = 100.00 %, " in printed
    assert "would become version 2 (dry run)" in printed
    assert champion() == "1"
    code, printed = models("promote", "tiny@candidate", "--data", data, "--min-gain", 100.5)
    assert code == 1
    assert "stays version 1" in printed
    assert champion() == "1"
    code, printed = models("promote", "tiny@candidate", "--data", data, "--min-gain", 1)
    assert code == 0, printed
    gain, p_value = re.search(r"gain +\+([\d.]+) points, p ([\de.-]+) ", printed).groups()
    assert champion() == "2"
    tags = client.get_model_version("tiny", "2").tags
    assert tags["promoted.before"] == "1"
    assert float(tags["promoted.gain"]) == pytest.approx(float(gain), abs=0.01)
    assert float(tags["promoted.p"]) == pytest.approx(float(p_value))
    assert tags["promoted.top1"] == f"{IMAGES}/{IMAGES}"

    code, printed = models("promote", "models:/tiny/1", "--data", data)
    assert code == 1, "the worse one"
    code, printed = models("promote", "tiny@candidate", "--data", data)
    assert code == 2
    assert "tiny@champion is version 2 already" in printed
    code, printed = models("history", "tiny")
    assert re.search(r"^2 +@candidate, @champion|^2 +@champion, @candidate", printed, re.MULTILINE), printed

    code, printed = models("list")
    assert re.search(r"^tiny +2 +@c\w+, @c\w+ ", printed, re.MULTILINE), printed
    code, printed = models("show", "tiny@champion")
    assert re.search(r"^model +models:/tiny/2$", printed, re.MULTILINE), printed
    assert re.search(r"^promoted.before +1$", printed, re.MULTILINE)
    code, printed = models("diff", "tiny/1", "tiny")
    assert re.search(r"^ +tiny/1 +tiny/2 *$", printed, re.MULTILINE), printed
    assert re.search(r"^promoted.before +1 *$", printed, re.MULTILINE), printed
    assert "architecture" not in printed, "it is the same"

    code, printed = models("rollback", "tiny")
    assert code == 0, printed
    assert "tiny@champion is version 1 again, it was version 2" in printed
    assert champion() == "1"
    code, printed = models("rollback", "tiny")
    assert code == 2
    assert "has no record of the previous @champion: nothing is changed" in printed


def test_missing_models_versions_and_aliases_are_named(models, registry):
    for arguments, message in {
        ("history", "tinny"): "no model named 'tinny'",
        ("show", "tinny"): "no model named 'tinny'",
        ("diff", "tiny/1", "tiny/9"): "versions: 2, 1",
        ("rollback", "tiny", "--alias", "nobody"): "tiny@nobody does not exist: there is nothing to roll back",
        ("promote", "tiny@nobody", "--data", registry[1]): "Aliases of tiny: ",
        ("promote", "tiny/2", "--data", registry[1], "--to", "latest"): "--to=latest is reserved by MLflow",
        ("promote", "tiny/2", "--data", registry[1], "--to", "V2"): "--to=V2 is reserved by MLflow",
    }.items():
        code, printed = models(*arguments)
        assert code == 2
        assert message in printed, printed


def test_a_model_that_gives_nan_is_not_promoted(registry, densenet, tmp_path):
    _, data = registry
    with start_run(tmp_path) as tracker:
        names = {"run_id": tracker.run_id, "name": "tiny", "alias": "candidate", "data_fingerprint": "f00d"}
        register(make_outputs_nan(write_model(tmp_path / "checkpoint", metrics=None)), stores=tracker.stores, **names)
    code, printed = densenet("models", "promote", "tiny@candidate", "--data", data, "--uri", tracker.uri)
    assert code == 2
    assert f"tiny version 1 gives NaN or infinities for {IMAGES} of {IMAGES} images" in " ".join(printed.split())
    assert MlflowClient(tracker.uri, tracker.uri).get_registered_model("tiny").aliases.keys() == {"candidate"}
