"""Weights from files: names of other projects, other classes, problems; models to learn from."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import DenseNet

from pipeline.errors import UserError
from pipeline.model.architectures import ARCHITECTURES
from pipeline.model.card import ModelCard, Transform
from pipeline.model.densenet import create
from pipeline.model.weights import load_model, load_teacher, load_weights
from tests.models import TRANSFORM


def other(num_classes: int = 5, **options: object) -> DenseNet:
    """A model with weights of its own."""
    torch.manual_seed(7)
    return timm.create_model("densenet_tiny", num_classes=num_classes, **options)


def write(file: Path, content: object) -> Path:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


def old_names(weights: dict) -> dict:
    """As torchvision wrote them before its version 0.3, without counters of batches."""
    weights = {name: value for name, value in weights.items() if "num_batches" not in name}
    for kind in ("norm", "conv"):
        for number in "12":
            weights = {
                name.replace(f".{kind}{number}.", f".{kind}.{number}.") if "denselayer" in name else name: value
                for name, value in weights.items()
            }
    return weights


WRAPPERS = {
    "plain.safetensors": lambda w: w,
    "plain.pth": lambda w: w,
    "old-torchvision.pth": old_names,
    "timm-training.pth.tar": lambda w: {"epoch": 3, "state_dict": w, "arch": "densenet_tiny"},
    "averaged.pth": lambda w: {"state_dict": {k: v * 0 for k, v in w.items()}, "state_dict_ema": w},
    "parallel.pth": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}},
    "compiled.pth": lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_files_of_timm_torchvision_and_wrappers_load(name, tmp_path):
    weights = other().state_dict()
    file = write(tmp_path / name, WRAPPERS[name](weights))
    model = create("densenet_tiny", 5)
    assert load_weights(model, file).head
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_torchvisions_densenet121_gives_the_same_logits(tmp_path):
    torchvision = pytest.importorskip("torchvision").models.densenet121(weights=None).eval()
    file = write(tmp_path / "torchvision.pth", torchvision.state_dict())
    model = create("densenet121", 1000)
    load_weights(model, file)
    image_1CHW = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model.eval()(image_1CHW), torchvision(image_1CHW), atol=1e-5)


def test_another_number_of_classes_keeps_the_new_classifier_and_says_so(tmp_path):
    file = write(tmp_path / "five.safetensors", other(5).state_dict())
    model = create("densenet_tiny", 3)
    fresh = model.classifier.weight.clone()
    assert not load_weights(model, file).head
    assert torch.equal(model.classifier.weight, fresh)
    assert torch.equal(model.features.conv0.weight, other().features.conv0.weight)


def test_names_and_shapes_that_do_not_fit_are_listed(tmp_path):
    weights = other().state_dict()
    del weights["features.norm5.weight"]
    weights["features.extra.weight"] = torch.zeros(1)
    weights["features.conv0.weight"] = torch.zeros(3, 3, 7, 7)
    file = write(tmp_path / "wrong.safetensors", weights)
    with pytest.raises(UserError) as error:
        load_weights(create("densenet_tiny", 5), file)
    message = str(error.value)
    assert "missing: features.norm5.weight" in message
    assert "not expected: features.extra.weight" in message
    assert "of another shape: features.conv0.weight [3, 3, 7, 7] for [24, 3, 7, 7]" in message
    with pytest.raises(UserError, match=r"and \d+ more.* Set model.name to the model that the file is of"):
        load_weights(create("densenet121", 5), write(tmp_path / "tiny.pth", other().state_dict()))


class Payload:
    def __reduce__(self) -> tuple:
        return (Path("/nowhere/executed").write_text, ("x",))


def test_files_that_would_run_code_or_hold_no_weights_are_refused(tmp_path):
    model = create("densenet_tiny", 5)
    with pytest.raises(UserError, match="holds more than weights, and loading it would run code"):
        load_weights(model, write(tmp_path / "code.pth", {"state_dict": Payload()}))
    with pytest.raises(UserError, match="does not hold a state dict"):
        load_weights(model, write(tmp_path / "numbers.pth", {"epoch": 3}))
    for name in ("garbage.pth", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(UserError, match=f"{name} "):
            load_weights(model, tmp_path / name)


def folder(place: Path, classes: tuple[str, ...], **options: object) -> Path:
    """A checkpoint's folder, as far as it is a model."""
    place.mkdir()
    model = other(len(classes), **options)
    save_file(model.state_dict(), place / "ema.safetensors")
    ModelCard(
        name="densenet_tiny",
        architecture=ARCHITECTURES["densenet_tiny"] | options,
        num_classes=len(classes),
        classes=classes,
        weights="ema.safetensors",
        transform=Transform(**TRANSFORM),
    ).write(place)
    return place


def test_a_model_is_built_from_its_card(tmp_path):
    options = {"in_chans": 1, "global_pool": "max"}
    model = load_model(folder(tmp_path / "checkpoint", ("a", "b"), **options))
    image_1CHW = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(image_1CHW), other(2, **options).eval()(image_1CHW))


def test_a_teacher_must_know_the_same_classes_and_take_the_same_images(tmp_path):
    place = folder(tmp_path / "checkpoint", ("cat", "dog"))
    model = load_teacher(place, ("cat", "dog"), 3)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match=r"2 classes apart \(cat, dog\), the data have 2 \(dog, cat\)"):
        load_teacher(place, ("dog", "cat"), 3)
    with pytest.raises(UserError, match="takes images of other channels than model.in_chans=1"):
        load_teacher(place, ("cat", "dog"), 1)
    with pytest.raises(UserError, match="is a file of weights alone"):
        load_teacher(place / "ema.safetensors", ("cat", "dog"), 3)
