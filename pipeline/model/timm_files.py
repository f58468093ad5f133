"""What is known of a file of weights that has no card: its model by its tensors, its classes and transform by timm."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.config import resolve_data_config

from pipeline.config import Model
from pipeline.errors import UserError
from pipeline.model.architectures import ARCHITECTURES, size
from pipeline.model.card import ModelCard, Transform
from pipeline.model.timm_models import architecture
from pipeline.model.weights import read_weights

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # what no gradient moves


def card_of_file(file: Path, classes: Sequence[str] | None = None) -> ModelCard:
    """A card for a DenseNet's weights as timm or torchvision name them.

    Model, channels and number of classes follow from the tensors. Class names and transform are those of timm's
    `config.json` beside the file, if there is one (`densenet export --to timm` writes it); else the names are
    ImageNet's where their number is that of one of its sets, and the transform timm's usual one for the model.

    Raises:
        UserError: it is no DenseNet of this project, or its classes are not known or of another number.
    """
    tensors, config = read_weights(file), _config_beside(file)
    model, num_classes = _net(file, tensors, config.get("model_args", {}).get("global_pool"))
    names = tuple(classes or config.get("label_names") or _imagenet(num_classes))
    if not names:
        raise UserError(f"{file} is a file of weights alone, without classes and transform: give its folder.")
    if len(names) != num_classes:
        raise UserError(f"{len(names)} classes are given, and {file} has {num_classes} logits: give one name for each.")
    usual = resolve_data_config(pretrained_cfg=_usual(model.name) | config.get("pretrained_cfg", {}))
    crop = usual["input_size"][-1]
    return ModelCard(
        name=model.name,
        architecture=architecture(model),
        num_classes=num_classes,
        classes=names,
        weights=file.name,
        transform=Transform(
            resize=int(crop / usual["crop_pct"]),
            crop=crop,
            interpolation=usual["interpolation"],
            mean=tuple(usual["mean"]),
            std=tuple(usual["std"]),
        ),
    )


def _net(file: Path, tensors: dict[str, torch.Tensor], pool: str | None) -> tuple[Model, int]:
    """The model that has as many parameters, and its number of classes; `pool` is its pooling where that is known."""
    parameters = sum(value.numel() for name, value in tensors.items() if not name.endswith(_STATISTICS))
    stem, head = tensors.get("features.conv0.weight"), tensors.get("classifier.weight")
    if stem is not None and head is not None:
        for name, pooling in product(ARCHITECTURES, [pool] if pool else ["avg", "catavgmax"]):
            model = Model.model_validate({"name": name, "in_chans": stem.shape[1], "global_pool": pooling})
            if size(model, len(head), 224).parameters == parameters:
                return model, len(head)
    raise UserError(
        f"{file} holds the weights of none of these models: {', '.join(ARCHITECTURES)}. Give a checkpoint's folder."
    )


def _usual(name: str) -> dict[str, Any]:
    found = timm.get_pretrained_cfg(name)
    assert found is not None  # all of them are registered
    return found.to_dict()


def _config_beside(file: Path) -> dict[str, Any]:
    place = file.with_name("config.json")
    if not place.is_file():
        return {}
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) and "architecture" in content else {}
    except ValueError as error:
        raise UserError(f"{place} cannot be read as JSON: {error}.") from error


def _imagenet(num_classes: int) -> list[str]:
    """WordNet ids in timm's order, where so many classes are one of ImageNet's sets."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return [] if subset is None else ImageNetInfo(subset).label_names()
