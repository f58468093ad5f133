"""`open_model`: one class for registered models, runs, checkpoints and weights files; results as typed values."""

import io
import json
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import pipeline
from pipeline.errors import CheckpointFormatError, UserError
from pipeline.export.package import register
from pipeline.model.densenet import create
from pipeline.model.weights import load_weights
from pipeline.train.checkpoint import verify
from tests.models import CLASSES, small_model, start_run, write_model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine images of two of the three classes."""
    rng = np.random.default_rng(0)
    for i in range(9):
        file = tmp_path / "set" / "val" / ("dog", "eel")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), np.uint8)).save(file)
    return tmp_path / "set"


def test_paths_bytes_and_arrays_are_the_same_image(data, tmp_path):
    model = pipeline.open_model(write_model(tmp_path / "model"))
    assert model.classes == CLASSES
    assert model.card.transform == pipeline.Transform(40, 32, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    file = data / "val" / "dog" / "0.png"
    pixels_HWC = np.asarray(Image.open(file))
    predictions = model.predict([file, str(file), file.read_bytes(), pixels_HWC], topk=2)
    assert [prediction.image for prediction in predictions] == [str(file), str(file), "image 2", "image 3"]
    for prediction in predictions:
        assert prediction.classes == pytest.approx(predictions[0].classes, abs=1e-6)
        assert len(prediction.classes) == 2
        assert prediction.best == max(prediction.classes, key=lambda name: prediction.classes[name])
    for single in (file, str(file), file.read_bytes(), pixels_HWC):
        assert model.predict(single)[0].best == predictions[0].best
    assert model.predict([]) == []
    with pytest.raises(FrozenInstanceError):
        predictions[0].image = "another"  # type: ignore[misc]


def test_the_weights_of_a_checkpoint_in_another_format_are_read(data, tmp_path):
    folder = write_model(tmp_path / "samples-000000000012")
    (folder / "manifest.json").write_text('{"format": 4, "files": {}}')
    with pytest.raises(CheckpointFormatError, match="`densenet eval`, `export` and model.weights still read"):
        verify(folder)
    assert pipeline.open_model(folder).predict(data / "val" / "dog" / "0.png")[0].best in CLASSES
    load_weights(small_model(seed=1), folder)


def test_invalid_images_are_reported_by_index(data, tmp_path):
    model = pipeline.open_model(write_model(tmp_path / "model"))
    valid = io.BytesIO()
    Image.new("L", (40, 40)).save(valid, "PNG")
    for images, message in (
        ([valid.getvalue(), b"text"], "image 1 is not an image that can be read"),
        ([np.zeros((4, 4), np.float32)], "image 0 is not an image that can be read .*must be uint8"),
        (["gone.jpg"], "gone.jpg does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            model.predict(images)


def test_evaluate_returns_what_the_command_prints(densenet, data, tmp_path):
    folder = write_model(tmp_path / "model")
    seen: list[tuple[int, int]] = []
    result = pipeline.open_model(folder, cache=tmp_path).evaluate(
        data, tta="flip", batch_size=4, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 9), (8, 9), (9, 9)]
    assert result.total == 9
    assert result.top1 == 100 * result.top1_correct / 9
    assert result.top5 == 100.0  # there are three classes only
    assert result.top5_correct == 9
    assert result.loss == result.plain.loss > 0
    assert result.transform == "resize 40 bilinear antialias, center crop 32, no EXIF rotation"
    code, printed = densenet("eval", folder, "--data", data, "--tta", "flip", "--batch-size", 4, "--json")
    assert code == 0
    assert json.loads(printed) == json.loads(json.dumps(asdict(result)))
    code, printed = densenet("predict", folder, data / "val" / "dog" / "0.png", "--top", 2, "--json")
    (prediction,) = pipeline.open_model(folder).predict(data / "val" / "dog" / "0.png", 2)
    assert json.loads(printed) == [asdict(prediction)]


def test_prediction_and_evaluation_can_alternate(data, tmp_path):
    model = pipeline.open_model(write_model(tmp_path / "model"), cache=tmp_path)
    file = data / "val" / "dog" / "0.png"
    before = model.predict(file)
    assert model.evaluate(data).total == 9
    assert model.predict(file) == before
    done = model.predict_folder(data, tmp_path / "predictions.parquet", topk=1)
    assert (done.classified, done.corrupt, done.out) == (9, 0, str(tmp_path / "predictions.parquet"))
    with torch.no_grad():
        assert torch.equal(model.module(torch.ones(1, 3, 32, 32)), small_model()(torch.ones(1, 3, 32, 32)))


def test_registered_models_and_runs_are_opened_by_uri(data, tmp_path, monkeypatch):
    checkpoint = write_model(tmp_path / "outputs" / "run" / "checkpoints" / "samples-000000000064")
    (checkpoint / "state.json").write_text('{"best_at": 64}')
    with start_run(tmp_path / "outputs") as tracker:
        names = {"name": "tiny", "alias": "candidate", "data_fingerprint": "f00d"}
        register(checkpoint, stores=tracker.stores, run_id=str(tracker.run_id), **names)
    monkeypatch.chdir(tmp_path)
    file = data / "val" / "dog" / "0.png"
    (expected,) = pipeline.open_model(checkpoint).predict(file)
    for name in ("models:/tiny@candidate", "models:/tiny/1", f"runs:/{tracker.run_id}/model", "outputs/run"):
        model = pipeline.open_model(name)
        assert model.model_uri == name
        assert model.predict(file)[0].classes == pytest.approx(expected.classes, abs=1e-6)
    with pytest.raises(UserError, match="classes has no effect: .* has a model card with class names"):
        pipeline.open_model("outputs/run", classes=["a"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("densenet_tiny", {}),
        ("densenet_tiny", {"in_chans": 1}),
        ("densenet_tiny", {"global_pool": "catavgmax"}),
        ("densenet_bc_l22_k12", {}),
        ("densenet121", {}),
    ],
)
def test_the_model_of_a_weights_file_is_identified(tmp_path, name, options):
    torch.manual_seed(1)
    plain = timm.create_model(name, num_classes=3, **options).eval()
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "weights.pth")
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    for file in ("weights.pth", "weights.safetensors"):
        model = pipeline.open_model(tmp_path / file, classes=["a", "b", "c"])
        assert (model.card.name, model.classes) == (name, ("a", "b", "c"))
        crop = model.card.transform.crop
        images_NCHW = torch.randn(1, model.card.in_chans, crop, crop)
        with torch.no_grad():
            assert torch.equal(model.module(images_NCHW), plain(images_NCHW))
        assert len(model.predict(np.zeros((300, 300, 3), np.uint8))[0].classes) == 3


def test_imagenet_class_names_follow_from_their_number(tmp_path):
    save_file(create("densenet_tiny", 1000).state_dict(), tmp_path / "weights.safetensors")
    model = pipeline.open_model(tmp_path / "weights.safetensors")
    assert model.classes[:2] == ("n01440764", "n01443537")
    assert model.card.transform.description.startswith("resize 256 bicubic antialias, center crop 224")


def test_a_timm_export_keeps_classes_and_transform(data, tmp_path):
    plain = pipeline.open_model(write_model(tmp_path / "model"), cache=tmp_path)
    exported = plain.export("timm", tmp_path / "out")
    assert exported.tolerance == 1e-4
    model = pipeline.open_model(Path(exported.file) / "model.safetensors", cache=tmp_path)
    assert model.classes == plain.classes
    assert model.card.transform == plain.card.transform
    assert model.evaluate(data).scores == plain.evaluate(data).scores


def test_unidentifiable_weights_files_are_rejected(tmp_path):
    save_file(create("densenet_tiny", 3).state_dict(), tmp_path / "three.safetensors")
    with pytest.raises(UserError, match="is a weights file without class names"):
        pipeline.open_model(tmp_path / "three.safetensors")
    with pytest.raises(UserError, match="classes has 2 names, but .* has 3 logits"):
        pipeline.open_model(tmp_path / "three.safetensors", classes=["a", "b"])
    save_file({"fc.weight": torch.zeros(3, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not match any of these models: densenet121, "):
        pipeline.open_model(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="MODEL=.*gone is no model"):
        pipeline.open_model(tmp_path / "gone")


def test_a_corrupt_model_card_is_reported(tmp_path):
    folder = write_model(tmp_path / "model")
    for content in ("{", "[]", '{"name": "densenet_tiny"}'):
        (folder / "model.json").write_text(content)
        with pytest.raises(UserError, match=r"model.json is not a model card of this project \(\w+: "):
            pipeline.open_model(folder)
