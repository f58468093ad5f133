"""Exports loaded without this project: ONNX, torch.export, timm folder, int8."""

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import save_file

from pipeline.errors import TrainingError
from pipeline.export.formats import OnnxModel, _check_logits, _crop_pct, to_onnx
from pipeline.export.open import open_model
from pipeline.export.package import register
from pipeline.model.architectures import ARCHITECTURES
from pipeline.model.card import ModelCard
from pipeline.model.densenet import create
from tests.kinds import KINDS
from tests.models import CLASSES, TRANSFORM, small_model, start_run, write_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow's of its own type hints
    from pipeline.export.pyfunc_model import decode_image, evaluation_transform

PROJECT = Path(__file__).parents[2]
IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(9))


def expected() -> torch.Tensor:
    with torch.no_grad():
        return small_model()(IMAGES)


def test_onnx_logits_equal_torchs_for_any_batch_size_and_metadata_has_the_classes(densenet, tmp_path):
    code, printed = densenet("export", write_model(tmp_path / "model"), "--to", "onnx", "--out", "out")
    assert code == 0, printed
    assert "opset 20" in printed
    file = tmp_path / "out" / "model.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        (logits_NK,) = session.run(["logits"], {"images": IMAGES[:count].numpy()})
        assert torch.allclose(torch.from_numpy(logits_NK), expected()[:count], atol=1e-4)
    metadata = {prop.key: json.loads(prop.value) for prop in onnx.load(file).metadata_props}
    assert metadata == {"name": "densenet_tiny", "classes": list(CLASSES), "transform": TRANSFORM}
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.onnx"]


def test_torch_export_and_timm_load_exports_without_this_project(densenet, tmp_path):
    model = write_model(tmp_path / "model")
    for kind in ("torch", "timm"):
        code, printed = densenet("export", model, "--to", kind, "--out", "out")
        assert code == 0, printed
    exported = torch.export.load(tmp_path / "out" / "model.pt2").module()
    plain = timm.create_model(f"local-dir:{tmp_path / 'out' / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        for count in (1, 5):
            assert torch.allclose(exported(IMAGES[:count]), expected()[:count], atol=1e-5)
        assert torch.equal(plain(IMAGES), expected())
    assert plain.pretrained_cfg["mean"] == TRANSFORM["mean"]
    assert plain.pretrained_cfg["input_size"] == [3, 32, 32] or plain.pretrained_cfg["input_size"] == (3, 32, 32)


def test_the_documented_onnx_code_gives_the_predictions_of_predict(densenet, tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    assert densenet("export", model, "--to", "onnx", "--out", "DIR")[0] == 0
    (code,) = re.findall(r"```python\n(.+?)```", (PROJECT / "docs" / "mlflow.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, kind in KINDS.items():
        Path("IMAGE").write_bytes(kind.content)
        done: dict[str, Any] = {}
        exec(code, done)
        probabilities_K = torch.from_numpy(done["logits_NK"][0]).softmax(0).sort(descending=True).values.tolist()
        (predicted,) = open_model(model).predict("IMAGE", len(CLASSES))
        assert probabilities_K == pytest.approx(list(predicted.classes.values()), abs=1e-4), name


def test_timms_transform_of_an_exported_folder_equals_the_models(densenet, tmp_path):
    assert densenet("export", write_model(tmp_path / "model"), "--to", "timm", "--out", "out")[0] == 0
    plain = timm.create_model(f"local-dir:{tmp_path / 'out' / 'timm'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(plain))
    for name, kind in KINDS.items():
        image = decode_image(kind.content)
        assert torch.allclose(transform(image), evaluation_transform(image, **TRANSFORM)[0], atol=1e-6), name


def test_timm_computes_the_same_resize_for_all_crops():
    for crop in range(16, 400):
        for resize in range(crop, 2 * crop):
            assert math.floor(crop / _crop_pct(crop, resize)) == resize


def test_the_cifar_stem_cannot_be_exported_to_timm(densenet, tmp_path):
    architecture = ARCHITECTURES["densenet_bc_l22_k12"]
    model = write_model(tmp_path / "model", name="densenet_bc_l22_k12", architecture=architecture)
    torch.manual_seed(0)
    save_file(create("densenet_bc_l22_k12", 3).state_dict(), model / "model.safetensors")
    code, printed = densenet("export", model, "--to", "timm", "--out", "out")
    assert code == 2
    assert "timm has no model with the CIFAR stem of densenet_bc_l22_k12: export it as onnx or torch" in printed
    code, printed = densenet("export", model, "--to", "onnx", "--out", "out")
    assert code == 0, printed


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve training and nine evaluation images with arbitrary labels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 9)):
        for i in range(count):
            file = tmp_path / "set" / split / CLASSES[i % 3] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (44, 50, 3), np.uint8)).save(file)
    return tmp_path / "set"


def test_int8_export_is_calibrated_evaluated_and_close_to_fp32(densenet, data, tmp_path):
    model = write_model(tmp_path / "model")
    code, printed = densenet("export", model, "--to", "int8", "--out", "out", "--data", data)
    assert code == 0, printed
    assert re.search(r"^fp32: top-1 \d/9 = [\d.]+ %, [\d,.]+ img/s", printed, re.MULTILINE)
    assert re.search(r"int8.onnx: -?[\d.]+ points of top-1 lost, [\d.]+ times the speed", printed)
    file = tmp_path / "out" / "model.int8.onnx"
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert "QuantizeLinear" in kinds and "DequantizeLinear" in kinds
    difference_NK = OnnxModel(file)(IMAGES) - expected()
    assert 0 < difference_NK.abs().max() < 0.3 * expected().abs().max()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.int8.onnx", "model.onnx"]


def test_an_export_is_attached_to_the_model_version(densenet, tmp_path):
    model = write_model(tmp_path / "model")
    with start_run(tmp_path) as tracker:
        names = {"name": "tiny", "alias": "candidate", "data_fingerprint": "f00d"}
        register(model, stores=tracker.stores, run_id=str(tracker.run_id), **names)
    arguments = ("export", "models:/tiny@candidate", "--to", "timm", "--out", "out", "--attach", "--uri", tracker.uri)
    code, printed = densenet(*arguments)
    assert code == 0, printed
    client = MlflowClient(tracker.uri, tracker.uri)
    artifact_uri = client.get_model_version("tiny", "1").tags["export.timm"]
    assert artifact_uri == f"runs:/{tracker.run_id}/exports/tiny-1/timm"
    files = [file.path for file in client.list_artifacts(tracker.run_id, "exports/tiny-1/timm")]
    assert sorted(files) == ["exports/tiny-1/timm/config.json", "exports/tiny-1/timm/model.safetensors"]


def test_different_logits_fail_the_export(tmp_path):
    card = ModelCard.read(write_model(tmp_path / "model"))
    with pytest.raises(TrainingError, match=r"the logits of the ONNX export of densenet_tiny differ from torch's by"):
        _check_logits(card, small_model(), small_model(seed=1), "ONNX")
    assert to_onnx(small_model(), card, tmp_path / "out").is_file()


def test_invalid_input_is_reported(densenet, tmp_path):
    model = write_model(tmp_path / "model")
    for arguments, message in (
        ((model, "--to", "tflite", "--out", "out"), "--to=tflite is not known: use onnx, torch, timm, int8"),
        ((model, "--to", "int8", "--out", "out"), "--to int8 needs --data"),
        ((model, "--to", "onnx", "--out", "out", "--attach"), "--attach adds files to a model version"),
        ((tmp_path / "gone", "--to", "onnx", "--out", "out"), "is no model"),
        ((model, "--to", "onnx", "--out", "/proc/x"), "--out=/proc/x cannot be written"),
    ):
        code, printed = densenet("export", *arguments)
        assert code == 2, printed
        assert message in " ".join(printed.split())
