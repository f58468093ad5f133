"""Weights of a model from a file: timm's, torchvision's or this project's; and what fine-tuning leaves alone."""

import importlib
import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import Finetune
from pipeline.errors import UserError, listed
from pipeline.model.card import ModelCard
from pipeline.model.densenet import create

# Names before torchvision 0.3 (`denselayer1.norm.1.weight`), and what wrappers put in front.
_OLD_NAME = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")
_WRAPPED = re.compile(r"^(?:module\.|_orig_mod\.)+")
_INSIDE = ("state_dict_ema", "state_dict", "model_ema", "model")


@dataclass(frozen=True)
class Loaded:
    """What became of the weights of a file: `head` is false where the classifier kept its random weights."""

    file: Path
    head: bool


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict under timm's names, on the CPU; nothing is executed.

    Raises:
        UserError: the file is not a state dict, or would run code on loading.
    """
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be read as weights: {_first_line(error)}") from error
    except Exception as error:  # pickle's errors have no common class
        raise UserError(
            f"{file} holds more than weights, and loading it would run code: {_first_line(error)} Save its "
            f"state_dict() as safetensors."
        ) from error
    for name in _INSIDE:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"{file} does not hold a state dict: names with tensors.")
    return {_OLD_NAME.sub(r"\1\2", _WRAPPED.sub("", name)): value for name, value in found.items()}


def load_weights(model: nn.Module, place: Path) -> Loaded:
    """Loads a file, or that of a folder with a model card, into a model.

    A classifier for another number of classes keeps its random weights.

    Raises:
        UserError: names are missing or not expected, or shapes differ; the message lists them.
    """
    file = place / ModelCard.read(place).weights if place.is_dir() else place
    given, wanted = read_weights(file), model.state_dict()
    classifier = _classifier(model)
    head = all(name in given and given[name].shape == wanted[name].shape for name in classifier)
    if not head:
        given |= {name: wanted[name] for name in classifier}
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}  # absent from old files
    problems = {
        "missing": [name for name in wanted if name not in given and name not in counters],
        "not expected": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} {list(given[name].shape)} for {list(wanted[name].shape)}"
            for name in wanted
            if name in given and given[name].shape != wanted[name].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{file} does not fit the model: {text}. Set model.name to the model that the file is of.")
    model.load_state_dict({name: given.get(name, wanted[name]) for name in wanted})
    return Loaded(file, head)


def load_model(folder: Path) -> nn.Module:
    """The model of a checkpoint's or a registered model's folder, in evaluation mode."""
    card = ModelCard.read(folder)
    import_model_code(card, folder)
    model = create(card.model, card.num_classes)
    load_weights(model, folder)
    return model.eval()


def import_model_code(card: ModelCard, folder: Path) -> None:
    """Imports the module that a card names for its model, where plain timm has no such model.

    Raises:
        UserError: it cannot be imported.
    """
    module = card.architecture.get("module")
    try:
        if module is not None:
            importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"the model of {folder}, {card.name}, comes from the module {module}, which cannot be imported "
            f"({error}): install it, or put its folder into PYTHONPATH."
        ) from error


def load_teacher(folder: Path, classes: tuple[str, ...], in_chans: int) -> nn.Module:
    """The model to learn from, without gradients.

    Raises:
        UserError: it knows other classes, or takes other images.
    """
    if not folder.is_dir():
        raise UserError(
            f"loss.teacher={folder} is a file of weights alone: give a checkpoint, a run, or models:/NAME@ALIAS, which "
            f"know their classes."
        )
    card, model = ModelCard.read(folder), load_model(folder)
    if card.classes != classes:
        raise UserError(
            f"loss.teacher in {folder} tells {len(card.classes)} classes apart ({listed(card.classes)}), the "
            f"data have {len(classes)} ({listed(classes)}): both must be the same list."
        )
    if card.in_chans != in_chans:
        raise UserError(f"loss.teacher in {folder} takes images of other channels than model.in_chans={in_chans}.")
    return model.requires_grad_(False)


def freeze(model: Any, finetune: Finetune) -> list[_BatchNorm]:
    """Takes the gradient from what fine-tuning leaves alone; returns the norms that must stay in evaluation mode."""
    frozen: list[nn.Module] = []
    if finetune.freeze_blocks:
        ends = (f"denseblock{finetune.freeze_blocks + 1}", "norm5")
        frozen = [m for _, m in takewhile(lambda child: child[0] not in ends, model.features.named_children())]
    norms = [m for module in frozen for m in module.modules() if isinstance(m, _BatchNorm)]
    if finetune.freeze_batch_norm:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for module in [*frozen, *norms]:
        module.requires_grad_(False)
    return norms


def rate_factors(model: Any, finetune: Finetune) -> dict[str, float]:
    """Each parameter's share of the learning rate; parameters that are left out have all of it.

    `layer_decay` is multiplied in for each step from the classifier to the stem; the steps are the classifier with the
    last norm, each dense block with its transition, and the stem (Bao et al. 2022, arXiv 2106.08254, with a dense block
    as a layer; in other models timm's stages). `head_lr_mult` multiplies the classifier's.
    """
    factors: dict[str, float] = {}
    if finetune.layer_decay < 1:
        layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        last = max(layers.values())
        factors = {name: finetune.layer_decay ** (last - layer) for name, layer in layers.items()}
    if finetune.head_lr_mult != 1:
        factors |= {name: factors.get(name, 1) * finetune.head_lr_mult for name in _classifier(model)}
    return factors


def _classifier(model: Any) -> list[str]:
    """The names of the classifier's parameters; some models have two."""
    found = model.get_classifier()
    heads = found if isinstance(found, tuple | list) else [found]
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if any(module is head for head in heads)
        for name, _ in module.named_parameters()
    ]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
