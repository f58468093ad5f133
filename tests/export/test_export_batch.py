"""`densenet predict` for a folder: the probabilities of `eval` in a table; corrupt files listed by name."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

from pipeline.data.dataset import open_split
from pipeline.data.folder_index import scan_images
from pipeline.errors import DataError
from pipeline.evaluation.probabilities import model_probabilities
from pipeline.export.open import open_model
from tests.models import CLASSES, make_outputs_nan, write_model


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten valid images in nested folders, of several formats."""
    rng = np.random.default_rng(0)
    for i in range(10):
        file = tmp_path / "set" / CLASSES[i % 3] / f"{i}.{'png' if i % 2 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + 3 * i, 60 - i, 3), np.uint8)).save(file)
    return tmp_path / "set"


def test_folder_predictions_equal_the_probabilities_of_the_evaluation(densenet, images, tmp_path):
    model, out = write_model(tmp_path / "model"), tmp_path / "out" / "predictions.parquet"
    code, printed = densenet("predict", model, "--batch", images, "--out", out, "--top", 2, "--batch-size", 4)
    assert code == 0, printed
    assert "10 images in" in printed
    assert "img/s" in printed
    index = open_split(images.parent / "set", "val", tmp_path / "index")
    expected_NK, _ = model_probabilities(model, index)
    rows = pq.read_table(out).to_pylist()
    by_name = {row["image"]: row for row in rows}
    assert len(by_name) == 10
    for i, row_K in enumerate(expected_NK):
        row = by_name[index.path(i).relative_to(images).as_posix()]
        assert row["class_name"] == CLASSES[row["class_id"]] == CLASSES[int(row_K.argmax())]
        assert row["probability"] == pytest.approx(row_K.max(), abs=1e-5)
        assert row["top_class_ids"] == np.argsort(-row_K)[:2].tolist()
        assert row["error"] is None
        (packaged,) = open_model(model).predict(index.path(i), 3)  # by Pillow, not by DALI
        for name, probability in packaged.classes.items():
            assert row_K[CLASSES.index(name)] == pytest.approx(probability, abs=2e-3)


def test_corrupt_files_are_rows_with_an_error(densenet, images, tmp_path):
    (images / "notes.txt").write_text("x")
    whole = (images / "cat" / "0.jpg").read_bytes()
    (images / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    holes = bytearray((images / "dog" / "1.png").read_bytes())
    holes[len(holes) // 2] ^= 0xFF  # only decoding detects it
    (images / "dog" / "1.png").write_bytes(holes)
    model, out = write_model(tmp_path / "model"), tmp_path / "predictions.parquet"
    code, printed = densenet("predict", model, "--batch", images, "--out", out)
    assert code == 0, printed
    assert "3 files are not valid images (column `error`)" in printed
    rows = pq.read_table(out).to_pylist()
    problems = {row["image"]: row["error"] for row in rows if row["error"]}
    assert set(problems) == {"notes.txt", "cat/cut.jpg", "dog/1.png"}
    assert "is a truncated JPEG" in problems["cat/cut.jpg"]
    assert len(rows) == 12


def test_a_file_deleted_after_the_scan_is_a_row_with_an_error(images, tmp_path, monkeypatch):
    model, out, gone = write_model(tmp_path / "model"), tmp_path / "predictions.parquet", images / "dog" / "1.png"

    def scan_then_delete(*arguments: Any) -> Any:
        scan = scan_images(*arguments)
        gone.unlink()
        return scan

    monkeypatch.setattr("pipeline.export.predict.scan_images", scan_then_delete)
    done = open_model(model).predict_folder(images, out)
    assert (done.classified, done.corrupt) == (9, 1)
    (problem,) = [row for row in pq.read_table(out).to_pylist() if row["error"]]
    assert (problem["image"], problem["error"]) == ("dog/1.png", f"{gone} cannot be read: No such file or directory.")


def test_linked_folders_are_followed_and_special_files_are_rows_with_an_error(densenet, images, tmp_path):
    (images / "cat").rename(tmp_path / "elsewhere")
    (images / "cat").symlink_to(tmp_path / "elsewhere")
    (images / "dog" / "broken.jpg").symlink_to("gone.jpg")
    (images / "dog" / "up").symlink_to("..")
    (images / ".hidden.jpg").write_bytes(b"x")
    os.mkfifo(images / "dog" / "fifo.jpg")
    out = tmp_path / "predictions.parquet"
    code, printed = densenet("predict", write_model(tmp_path / "model"), "--batch", images, "--out", out)
    assert code == 0, printed
    assert "10 images in" in printed
    assert "ignored: 1 hidden files and folders: .hidden.jpg" in printed
    assert {row["image"]: row["error"] for row in pq.read_table(out).to_pylist() if row["error"]} == {
        "dog/broken.jpg": "is a broken link to gone.jpg",
        "dog/fifo.jpg": "is a FIFO, not a file",
        "dog/up": "is a link to a folder that is already listed as .",
    }


def test_invalid_input_is_reported(densenet, images, tmp_path):
    model = write_model(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((model,), "give image files, or a folder with --batch DIR --out FILE.parquet"),
        ((model, "--batch", images), "give image files, or a folder with --batch DIR --out FILE.parquet"),
        ((model, "--batch", tmp_path / "gone", "--out", "x.parquet"), "is not a folder: use one with images"),
        ((model, "--batch", tmp_path / "empty", "--out", "x.parquet"), "contains no files: pass a folder with images"),
        ((model, "--batch", images, "--out", "/proc/x.parquet"), "--out=/proc/x.parquet cannot be written"),
    ):
        code, printed = densenet("predict", *arguments)
        assert code == 2, printed
        assert message in " ".join(printed.split())


def test_a_failed_prediction_leaves_no_partial_file(densenet, images, tmp_path, monkeypatch):
    def gone(*arguments: object, **options: object) -> None:
        raise DataError("the folder has gone")

    monkeypatch.setattr("pipeline.export.predict._probabilities", gone)
    monkeypatch.setattr("pipeline.export.predict._find_corrupt", gone)
    code, printed = densenet(
        "predict", write_model(tmp_path / "model"), "--batch", images, "--out", tmp_path / "out" / "predictions.parquet"
    )
    assert (code, printed) == (2, "error: the folder has gone\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_images_with_nan_outputs_have_no_predicted_class(densenet, images, tmp_path):
    model, out = make_outputs_nan(write_model(tmp_path / "model")), tmp_path / "predictions.parquet"
    code, printed = densenet("predict", model, "--batch", images, "--out", out)
    assert code == 0, printed
    assert "0 images in" in printed
    assert "for 10 the model gives NaN or infinities (column `error`)" in printed
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 10
    for row in rows:
        assert row["error"] == "the model outputs NaN or infinities"
        assert {row[name] for name in row if name not in ("image", "error")} == {None}
    file = images / "cat" / "0.jpg"
    code, printed = densenet("predict", model, file)
    assert code == 2, printed
    assert f"{file}: the model in {model} outputs NaN or infinities: it cannot be used." in " ".join(printed.split())
    with pytest.raises(MlflowException, match="NaN or infinities for row 1 of `image`"):
        infinite_once(write_model(tmp_path / "valid")).predict(None, pd.DataFrame({"image": [file, file]}))


def infinite_once(folder: Path) -> Any:
    """The packaged model with an infinite output for the second of two images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's advice on type hints
        from pipeline.export.pyfunc_model import Classifier

    model = Classifier()
    artifacts = {"card": str(folder / "model.json"), "weights": str(folder / "model.safetensors")}
    model.load_context(SimpleNamespace(artifacts=artifacts))
    valid = model.model
    model.model = lambda images_NCHW: valid(images_NCHW) * torch.tensor([[1.0], [float("inf")]])
    return model
