"""Infers a model card for a weights file without one: model from the tensors, classes and transform from timm."""

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

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # batch norm buffers: not trainable


def card_from_weights(file: Path, classes: Sequence[str] | None = None) -> ModelCard:
    """Returns a model card for DenseNet weights with parameter names of timm or torchvision.

    Model, channels and number of classes follow from the tensors. Class names and transform come from timm's
    `config.json` in the same folder, if it exists (`densenet export --to timm` writes it). Otherwise the class names
    are ImageNet's, if the number of classes matches one of its subsets, and the transform is timm's default for the
    model.

    Raises:
        UserError: The file is not a DenseNet of this project, its class names are unknown, or their number differs.
    """
    tensors, config = read_weights(file), _timm_config(file)
    model, num_classes = _identify_model(file, tensors, config.get("model_args", {}).get("global_pool"))
    names = tuple(classes or config.get("label_names") or _imagenet_classes(num_classes))
    if not names:
        raise UserError(
            f"{file} is a weights file without class names and transform: pass the checkpoint folder, or the class "
            f"names."
        )
    if len(names) != num_classes:
        raise UserError(
            f"classes has {len(names)} names, but {file} has {num_classes} logits: pass one class name per logit."
        )
    defaults = resolve_data_config(pretrained_cfg=_pretrained_cfg(model.name) | config.get("pretrained_cfg", {}))
    crop = defaults["input_size"][-1]
    return ModelCard(
        name=model.name,
        architecture=architecture(model),
        num_classes=num_classes,
        classes=names,
        weights=file.name,
        transform=Transform(
            resize=int(crop / defaults["crop_pct"]),
            crop=crop,
            interpolation=defaults["interpolation"],
            mean=tuple(defaults["mean"]),
            std=tuple(defaults["std"]),
        ),
    )


def _identify_model(file: Path, tensors: dict[str, torch.Tensor], pool: str | None) -> tuple[Model, int]:
    """Finds the model by its parameter count; returns it and its number of classes. `pool`: `global_pool`, if known."""
    parameters = sum(value.numel() for name, value in tensors.items() if not name.endswith(_BUFFERS))
    stem, head = tensors.get("features.conv0.weight"), tensors.get("classifier.weight")
    if stem is not None and head is not None:
        for name, pooling in product(ARCHITECTURES, [pool] if pool else ["avg", "catavgmax"]):
            model = Model.model_validate({"name": name, "in_chans": stem.shape[1], "global_pool": pooling})
            if size(model, len(head), 224).parameters == parameters:
                return model, len(head)
    raise UserError(f"{file} does not match any of these models: {', '.join(ARCHITECTURES)}. Pass a checkpoint folder.")


def _pretrained_cfg(name: str) -> dict[str, Any]:
    config = timm.get_pretrained_cfg(name)
    assert config is not None  # all of them are registered
    return config.to_dict()


def _timm_config(file: Path) -> dict[str, Any]:
    """Reads timm's `config.json` from the folder of `file`; empty if there is none."""
    config_file = file.with_name("config.json")
    if not config_file.is_file():
        return {}
    try:
        content = json.loads(config_file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) and "architecture" in content else {}
    except ValueError as error:
        raise UserError(f"{config_file} cannot be read as JSON: {error}.") from error


def _imagenet_classes(num_classes: int) -> list[str]:
    """Returns WordNet ids in timm's order if an ImageNet subset has this many classes, else an empty list."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return [] if subset is None else ImageNetInfo(subset).label_names()
