"""Loading weights: parameter names of timm and torchvision, other classes, invalid files; distillation teachers."""

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
    """A model with other random weights."""
    torch.manual_seed(7)
    return timm.create_model("densenet_tiny", num_classes=num_classes, **options)


def write(file: Path, content: object) -> Path:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


def old_names(weights: dict) -> dict:
    """Parameter names as in torchvision before 0.3, without `num_batches_tracked`."""
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
    "ema.pth": lambda w: {"state_dict": {k: v * 0 for k, v in w.items()}, "state_dict_ema": w},
    "parallel.pth": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}},
    "compiled.pth": lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_weights_of_timm_torchvision_and_wrapped_models_load(name, tmp_path):
    weights = other().state_dict()
    file = write(tmp_path / name, WRAPPERS[name](weights))
    model = create("densenet_tiny", 5)
    assert load_weights(model, file).head_loaded
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_torchvision_densenet121_weights_give_the_same_logits(tmp_path):
    torchvision = pytest.importorskip("torchvision").models.densenet121(weights=None).eval()
    file = write(tmp_path / "torchvision.pth", torchvision.state_dict())
    model = create("densenet121", 1000)
    load_weights(model, file)
    image_1CHW = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model.eval()(image_1CHW), torchvision(image_1CHW), atol=1e-5)


def test_weights_with_another_number_of_classes_keep_the_new_classifier(tmp_path):
    file = write(tmp_path / "five.safetensors", other(5).state_dict())
    model = create("densenet_tiny", 3)
    fresh = model.classifier.weight.clone()
    assert not load_weights(model, file).head_loaded
    assert torch.equal(model.classifier.weight, fresh)
    assert torch.equal(model.features.conv0.weight, other().features.conv0.weight)


def test_missing_unexpected_and_mismatched_parameters_are_listed(tmp_path):
    weights = other().state_dict()
    del weights["features.norm5.weight"]
    weights["features.extra.weight"] = torch.zeros(1)
    weights["features.conv0.weight"] = torch.zeros(3, 3, 7, 7)
    file = write(tmp_path / "wrong.safetensors", weights)
    with pytest.raises(UserError) as error:
        load_weights(create("densenet_tiny", 5), file)
    message = str(error.value)
    assert "missing: features.norm5.weight" in message
    assert "unexpected: features.extra.weight" in message
    assert "shape mismatch: features.conv0.weight [3, 3, 7, 7] instead of [24, 3, 7, 7]" in message
    with pytest.raises(UserError, match=r"and \d+ more.* Set model.name to the model of this file"):
        load_weights(create("densenet121", 5), write(tmp_path / "tiny.pth", other().state_dict()))


class Payload:
    def __reduce__(self) -> tuple:
        return (Path("/nowhere/executed").write_text, ("x",))


def test_files_that_would_run_code_or_contain_no_weights_are_rejected(tmp_path):
    model = create("densenet_tiny", 5)
    with pytest.raises(UserError, match="contains more than weights, and loading it would run code"):
        load_weights(model, write(tmp_path / "code.pth", {"state_dict": Payload()}))
    with pytest.raises(UserError, match="does not contain a state dict"):
        load_weights(model, write(tmp_path / "numbers.pth", {"epoch": 3}))
    for name in ("garbage.pth", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(UserError, match=f"{name} "):
            load_weights(model, tmp_path / name)


def write_checkpoint(folder: Path, classes: tuple[str, ...], **options: object) -> Path:
    """Writes the model files of a checkpoint folder: EMA weights and model card."""
    folder.mkdir()
    model = other(len(classes), **options)
    save_file(model.state_dict(), folder / "ema.safetensors")
    ModelCard(
        name="densenet_tiny",
        architecture=ARCHITECTURES["densenet_tiny"] | options,
        num_classes=len(classes),
        classes=classes,
        weights="ema.safetensors",
        transform=Transform(**TRANSFORM),
    ).write(folder)
    return folder


def test_a_model_is_built_from_its_card(tmp_path):
    options = {"in_chans": 1, "global_pool": "max"}
    model = load_model(write_checkpoint(tmp_path / "checkpoint", ("a", "b"), **options))
    image_1CHW = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(image_1CHW), other(2, **options).eval()(image_1CHW))


def test_a_teacher_must_have_the_same_classes_and_input_channels(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", ("cat", "dog"))
    model = load_teacher(folder, ("cat", "dog"), 3)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match=r"has 2 classes \(cat, dog\), the data have 2 \(dog, cat\)"):
        load_teacher(folder, ("dog", "cat"), 3)
    with pytest.raises(UserError, match="expects images of 3 channels, but model.in_chans=1"):
        load_teacher(folder, ("cat", "dog"), 1)
    with pytest.raises(UserError, match="is a weights file without class names"):
        load_teacher(folder / "ema.safetensors", ("cat", "dog"), 3)
