"""The packaged model: registration, lookup, loading and serving without this project, correct predictions."""

import base64
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import requests
import torch
from mlflow.tracking import MlflowClient
from PIL import Image
from torchvision.transforms import functional as tv

from launch.cluster.ports import free_port
from pipeline.data.batch_ops import gray
from pipeline.errors import UserError
from pipeline.export.open import open_model
from pipeline.export.package import RegisteredModel, register
from pipeline.model.architectures import ARCHITECTURES
from pipeline.model.densenet import create
from pipeline.model.weights import load_model
from pipeline.tracking.stores import Stores
from pipeline.train.model_source import resolve_model
from tests.conftest import BIN
from tests.export.test_image_sizes import large
from tests.kinds import KINDS, REFUSED
from tests.models import TRANSFORM, small_model, start_run, write_model
from tests.servers import PATIENCE_S

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[RegisteredModel, str, Path]:
    """A model in its own registry, the URI of the registry, and a folder with an image."""
    folder = tmp_path_factory.mktemp("registry")
    checkpoint = write_model(folder / "checkpoint", CLASSES)
    with start_run(folder) as tracker:
        names = {"name": "tiny", "alias": "candidate", "data_fingerprint": "f00d"}
        model = register(checkpoint, stores=tracker.stores, run_id=str(tracker.run_id), **names)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.jpg")
    return model, tracker.uri, folder


def expected(image: Path) -> torch.Tensor:
    with Image.open(image) as image:
        cut = tv.center_crop(tv.resize(image.convert("RGB"), TRANSFORM["resize"]), TRANSFORM["crop"])
    with torch.no_grad():
        return small_model(len(CLASSES))(
            tv.normalize(tv.to_tensor(cut), TRANSFORM["mean"], TRANSFORM["std"])[None]
        ).softmax(1)[0]


def test_the_version_has_alias_and_results(registered):
    model, uri, _ = registered
    assert (model.name, model.version, model.uri) == ("tiny", "1", "models:/tiny@candidate")
    version = MlflowClient(uri, uri).get_model_version_by_alias("tiny", "candidate")
    assert version.tags["top1_correct"] == "3"
    assert version.tags["total"] == "5"
    assert version.tags["data.fingerprint"] == "f00d"
    assert json.loads(version.tags["transform"]) == TRANSFORM


def test_predictions_equal_timm_with_torchvisions_transform(registered, tmp_path):
    model, uri, folder = registered
    run_id = MlflowClient(uri, uri).get_model_version("tiny", "1").run_id
    for name in (model.uri, "models:/tiny/1", f"runs:/{run_id}/model", str(folder / "checkpoint")):
        path = resolve_model(name, "MODEL", tmp_path, Stores(uri, uri))
        (prediction,) = open_model(path).predict(folder / "image.jpg", 99)
        probabilities = expected(folder / "image.jpg")
        assert [*prediction.classes.values()] == sorted(prediction.classes.values(), reverse=True)
        for class_name, probability in prediction.classes.items():
            assert probability == pytest.approx(probabilities[CLASSES.index(class_name)].item(), abs=1e-6)
        assert len(prediction.classes) == len(CLASSES)


def test_mlflow_load_model_predicts_bytes_base64_arrays_and_paths(registered):
    model, uri, folder = registered
    mlflow.set_tracking_uri(uri)
    content = (folder / "image.jpg").read_bytes()
    with Image.open(folder / "image.jpg") as image:
        pixels_HWC = np.asarray(image)
    loaded = mlflow.pyfunc.load_model(model.uri)
    forms = [content, base64.b64encode(content).decode(), folder / "image.jpg", pixels_HWC, pixels_HWC.tolist()]
    frame = loaded.predict(pd.DataFrame({"image": forms}))
    probabilities_K = expected(folder / "image.jpg")
    for row_K in frame["probabilities"]:
        assert row_K == pytest.approx(probabilities_K.tolist(), abs=1e-6)
    assert frame["class_name"][0] == CLASSES[frame["class_id"][0]]
    assert frame["probability"][0] == max(frame["probabilities"][0])
    for wrong in (b"no image", "no base64!", str(folder / "image.jpg"), Path("/gone.jpg"), pixels_HWC * 1.5, None):
        with pytest.raises(mlflow.MlflowException, match="row 1 of `image` is not an image"):
            loaded.predict(pd.DataFrame({"image": [content, wrong]}))
    many = loaded.predict(pd.DataFrame({"image": [content] * 70}))
    assert len(many) == 70
    assert loaded.predict(pd.DataFrame({"image": []})).empty


@pytest.mark.slow
def test_mlflow_models_predict_scores_a_file(registered, tmp_path):
    model, uri, folder = registered
    image = base64.b64encode((folder / "image.jpg").read_bytes()).decode()
    request, response = tmp_path / "request.json", tmp_path / "response.json"
    request.write_text(json.dumps({"dataframe_split": {"columns": ["image"], "data": [[image]]}}))
    done = subprocess.run(
        [BIN / "mlflow", "models", "predict", "-m", model.uri, "-i", request, "-o", response, "--env-manager", "local"],
        env=os.environ | {"MLFLOW_TRACKING_URI": uri, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(response.read_text())["predictions"]
    assert row["probabilities"] == pytest.approx(expected(folder / "image.jpg").tolist(), abs=1e-6)


@pytest.mark.slow
def test_mlflow_serves_the_model_over_http(registered):
    """`mlflow models serve` on loopback returns the same predictions as the model in this process."""
    model, uri, folder = registered
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model.uri, "--env-manager", "local"]
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            env=os.environ | {"MLFLOW_TRACKING_URI": uri, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE_S
        while not _is_up(f"{address}/ping"):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "serve.log").read_text()
            time.sleep(0.2)
        image = base64.b64encode((folder / "image.jpg").read_bytes()).decode()
        body = {"dataframe_split": {"columns": ["image"], "data": [[image], [image]]}}
        response = requests.post(f"{address}/invocations", json=body, timeout=60)
        assert response.ok, response.text
        first, second = response.json()["predictions"]
        probabilities_K = expected(folder / "image.jpg")
        assert second["probabilities"] == pytest.approx(probabilities_K.tolist(), abs=1e-6)
        assert first["probabilities"] == pytest.approx(probabilities_K.tolist(), abs=1e-6)
        assert first["class_name"] == CLASSES[int(probabilities_K.argmax())]
        wrong = requests.post(
            f"{address}/invocations", json={"dataframe_split": {"columns": ["x"], "data": [[1]]}}, timeout=60
        )
        assert wrong.status_code == 400
        sixteen = base64.b64encode(KINDS["PNG gray 16 bits"].content).decode()
        lists = KINDS["PNG gray 16 bits"].pixels_HWC.tolist()
        body = {"dataframe_split": {"columns": ["image"], "data": [[sixteen], [lists]]}}
        first, second = requests.post(f"{address}/invocations", json=body, timeout=60).json()["predictions"]
        assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-6)
        for data, message in (
            (
                base64.b64encode(REFUSED["TIFF floats"][0]).decode(),
                "has pixels of PIL's mode F: convert it to an 8-bit",
            ),
            (base64.b64encode(large()).decode(), "has 20,000 x 20,000 pixels, more than the limit of 178,956,970"),
            (json.loads("[" * 200 + "]" * 200), "is not an image"),
        ):
            body = {"dataframe_split": {"columns": ["image"], "data": [[image], [data]]}}
            wrong = requests.post(f"{address}/invocations", json=body, timeout=60)
            assert wrong.status_code == 400
            assert f"row 1 of `image` {message}" in wrong.json()["message"]
        for data in ("bm8gcGljdHVyZQ==", str(folder / "image.jpg"), "/etc/passwd"):  # no image; paths
            body = {"dataframe_split": {"columns": ["image"], "data": [[data]]}}
            wrong = requests.post(f"{address}/invocations", json=body, timeout=60)
            assert wrong.status_code == 400
            assert "row 0 of `image` is not an image: pass the bytes of a JPEG" in wrong.json()["message"]
            assert "Traceback" not in wrong.text
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:  # in separate process groups
            process.kill()
        server.wait()


def _is_up(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:  # also a timeout on a busy machine
        return False


def test_the_model_loads_without_this_project(registered):
    model, uri, folder = registered
    code = f"""
import sys, mlflow, pandas
mlflow.set_tracking_uri({uri!r})
loaded = mlflow.pyfunc.load_model({model.uri!r})
print(loaded.predict(pandas.DataFrame({{"image": [open("image.jpg", "rb").read()]}}))["class_name"][0])
assert not [name for name in sys.modules if name.split(".")[0] in ("pipeline", "launch")]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == CLASSES[int(expected(folder / "image.jpg").argmax())]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models:/tony@candidate", "no model named 'tony' .* Registered: tiny"),
        ("models:/tiny@champion", r"Aliases of tiny: @candidate \(version 1\); versions: 1"),
        ("models:/tiny/7", r"Aliases of tiny: @candidate \(version 1\); versions: 1"),
        ("models:/tiny", "write models:/NAME@ALIAS or models:/NAME/VERSION"),
        (f"runs:/{'0' * 32}/model", "there is no run 0+"),
    ],
)
def test_errors_for_unknown_models_list_the_existing_ones(registered, tmp_path, name, message):
    _, uri, _ = registered
    with pytest.raises(UserError, match=message):
        resolve_model(name, "MODEL", tmp_path, Stores(uri, uri))


def test_errors_for_unknown_models_of_a_run_list_the_existing_ones(registered, tmp_path):
    _, uri, _ = registered
    run_id = MlflowClient(uri, uri).get_model_version("tiny", "1").run_id
    with pytest.raises(UserError, match=f"the run {run_id} has no model 'other', its models: model"):
        resolve_model(f"runs:/{run_id}/other", "MODEL", tmp_path, Stores(uri, uri))


def test_errors_name_files_that_are_not_images(registered):
    _, _, folder = registered
    (folder / "notes.txt").write_text("x")
    for file, message in (
        ("gone.jpg", "does not exist"),
        ("checkpoint", "is not a file"),
        ("notes.txt", "not an image"),
    ):
        with pytest.raises(UserError, match=f"{file} .*{message}|{file} {message}"):
            open_model(folder / "checkpoint").predict(folder / file)


@pytest.mark.parametrize("name", ["densenet121", "densenet_bc_l40_k12"])
def test_the_packaged_code_builds_the_same_model(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's of its own type hints
        from pipeline.export.pyfunc_model import build_model as packaged_model

    torch.manual_seed(0)
    ours, packaged = create(name, 10).eval(), packaged_model(ARCHITECTURES[name], 10).eval()
    packaged.load_state_dict(ours.state_dict(), strict=True)
    images_NCHW = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(packaged(images_NCHW), ours(images_NCHW))


def test_a_registered_model_is_downloaded_once_and_built_from_its_card(registered, tmp_path):
    model, uri, folder = registered
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/other.db")  # MLflow's process-wide URI has no effect
    path = resolve_model(model.uri, "model.weights", tmp_path / "models", Stores(uri, uri))
    first = (path / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("models:/tiny/1", "model.weights", tmp_path / "models", Stores(uri, uri)) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == first
    probabilities = expected(folder / "image.jpg")
    with Image.open(folder / "image.jpg") as image:
        cut = tv.center_crop(tv.resize(image.convert("RGB"), TRANSFORM["resize"]), TRANSFORM["crop"])
    image_1CHW = tv.normalize(tv.to_tensor(cut), TRANSFORM["mean"], TRANSFORM["std"])[None]
    with torch.no_grad():
        assert torch.allclose(load_model(path)(image_1CHW).softmax(1)[0], probabilities, atol=1e-6)
    with pytest.raises(UserError, match=r"no model named 'tinny' .* Registered: tiny"):
        resolve_model("models:/tinny@candidate", "loss.teacher", tmp_path / "models", Stores(uri, uri))
    with pytest.raises(UserError, match=r"loss.teacher=.*gone is no model: give a checkpoint's or a run's folder"):
        resolve_model(str(tmp_path / "gone"), "loss.teacher", tmp_path / "models", Stores(uri, uri))


def test_gray_images_equal_those_of_training(tmp_path):
    """One channel: the packaged transform, the loader's batches and Pillow's own conversion agree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pipeline.export.pyfunc_model import evaluation_transform
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    options = {"resize": 40, "crop": 32, "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
    rgb_1CHW = evaluation_transform(Image.fromarray(pixels), **options)
    gray_11HW = evaluation_transform(Image.fromarray(pixels), **options, channels=1)
    assert torch.allclose(gray_11HW, gray(rgb_1CHW, tuple(options["std"])), atol=1e-5)
    luma = np.array([0.299, 0.587, 0.114])
    pillow_HW = np.asarray(Image.fromarray(pixels).convert("L"), np.float64)[4:36, 4:36] / 255
    expected_HW = (pillow_HW - luma @ options["mean"]) / (luma @ options["std"])
    assert np.abs(gray_11HW[0, 0].numpy() - expected_HW).max() < 0.6 / 255 / (luma @ options["std"])
