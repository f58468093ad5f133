"""`densenet eval`, and test-time augmentation compared with torchvision's ten-crop."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image

from pipeline.data.dataset import open_split
from pipeline.evaluation.probabilities import model_probabilities
from pipeline.model.weights import load_model
from tests.models import TRANSFORM, make_outputs_nan, write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "checkpoint", seed=3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine images of several shapes in two of the three classes."""
    rng = np.random.default_rng(0)
    for i in range(9):
        file = tmp_path / "set" / "val" / ("dog", "eel")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + 3 * i, 60 - i, 3), np.uint8)).resize((60, 50)).save(file)
    return tmp_path / "set"


def by_hand(model: Path, file: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image's probabilities by torchvision: center crop, average with its flip, average over ten crops."""
    network = load_model(model)
    with Image.open(file) as image:
        image_CHW = tv.resize(tv.pil_to_tensor(image.convert("RGB")), [40], antialias=True)
    crops = [tv.normalize(crop / 255, TRANSFORM["mean"], TRANSFORM["std"]) for crop in tv.ten_crop(image_CHW, [32, 32])]
    with torch.no_grad():
        probabilities = network(torch.stack(crops)).softmax(dim=1)  # 4 corners and the center, then the same flipped
    return probabilities[4], probabilities[[4, 9]].mean(dim=0), probabilities.mean(dim=0)


@pytest.mark.parametrize(("views", "result"), [("flip", 1), ("ten-crop", 2)])
def test_tta_equals_torchvisions_crops(model, data, tmp_path, views, result):
    index = open_split(data, "val", tmp_path / "cache")
    plain_NK, averaged_NK = model_probabilities(model, index, views=views, batch_size=4)
    for sample in range(len(index)):
        expected = by_hand(model, index.path(sample))
        assert plain_NK[sample] == pytest.approx(expected[0].numpy(), abs=2e-3)
        assert averaged_NK[sample] == pytest.approx(expected[result].numpy(), abs=2e-3)
        assert averaged_NK[sample].sum() == pytest.approx(1, abs=1e-5)


def test_scores_are_printed_by_name_and_written_as_tables(densenet, model, data, tmp_path):
    labels = tmp_path / "real.json"
    labels.write_text(json.dumps([[0, 1, 2]] * 8 + [[]]))
    out = tmp_path / "out"
    code, printed = densenet("eval", model, "--data", data, "--tta", "ten-crop", "--labels", labels, "--out", out)
    assert code == 0, printed
    assert "resize 40 bilinear antialias, center crop 32" in printed
    assert "top-1 8/8 = 100.00 % by" in printed
    assert "1 images without label" in printed
    report = json.loads((out / "scores.json").read_text())
    assert set(report["scores"]) == {"plain", "ten-crop", "labels"}
    plain = report["scores"]["plain"]
    assert f"plain     top-1 {plain['top1_correct']}/9" in printed
    with (out / "per_class.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["class"], row["images"]) for row in rows] == [("cat", "0"), ("dog", "5"), ("eel", "4")]
    assert sum(int(row["top1_correct"]) for row in rows) == plain["top1_correct"]
    with (out / "confusion.csv").open() as stream:
        matrix = np.array([row[1:] for row in csv.reader(stream)][1:], int)
    assert matrix.sum(axis=1).tolist() == [0, 5, 4]
    assert np.trace(matrix) == plain["top1_correct"]
    with (out / "predictions.csv").open() as stream:
        images = list(csv.DictReader(stream))
    assert sum(row["class"] == row["predicted"] for row in images) == plain["top1_correct"]


def test_another_resolution_keeps_the_crop_ratio_and_is_reported(densenet, model, data):
    code, printed = densenet("eval", model, "--data", data, "--crop", 48, "--interpolation", "bicubic", "--json")
    assert code == 0, printed
    report = json.loads(printed)
    assert report["transform"].startswith("resize 60 bicubic antialias, center crop 48")
    assert report["scores"]["plain"]["total"] == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tta", "twenty"], "--tta=twenty is not known: use flip or ten-crop"),
        (["--interpolation", "nearest"], "--interpolation=nearest is not known"),
        (["--crop", 64, "--resize", 32], "--crop=64 must not exceed --resize=32"),
        (["--labels", "gone.json"], "--labels=gone.json cannot be read as JSON"),
        (["--split", "test"], "has no split 'test', it has val"),
    ],
)
def test_invalid_options_are_reported(densenet, model, data, arguments, message):
    code, printed = densenet("eval", model, "--data", data, *arguments)
    assert code == 2, printed
    assert "Traceback" not in printed
    assert re.search(message, printed.replace("\n", " ")), printed


def test_a_path_without_a_model_is_reported(densenet, model, data, tmp_path):
    for path, message in (
        (tmp_path / "nothing", "MODEL=.* is no model"),
        (model / "model.safetensors", "is a weights file without class names"),
    ):
        code, printed = densenet("eval", path, "--data", data)
        assert code == 2, printed
        assert re.search(message, printed.replace("\n", " ")), printed


def test_nan_outputs_count_as_incorrect_and_have_no_class(densenet, model, data, tmp_path):
    out = tmp_path / "out"
    code, printed = densenet("eval", make_outputs_nan(model), "--data", data, "--tta", "flip", "--out", out)
    assert code == 0, printed
    for name in ("plain", "flip"):
        assert re.search(
            rf"^{name} +top-1 0/9 = 0.00 %, top-3 0/9 = 0.00 %, NaN or infinities for 9 of 9, loss -, cal"
            r"ibration error -$",
            printed,
            re.MULTILINE,
        ), printed
    assert "NaN" not in (out / "scores.json").read_text()
    with (out / "predictions.csv").open() as stream:
        assert {(row["predicted"], row["probability"], row["of_class"]) for row in csv.DictReader(stream)} == {
            ("",) * 3
        }
    with (out / "per_class.csv").open() as stream:
        assert [row["images"] for row in csv.DictReader(stream)] == ["0", "5", "4"]
