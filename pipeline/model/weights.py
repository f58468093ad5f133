"""Loads pretrained weights (timm, torchvision, this project), the distillation teacher; freezes layers."""

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

# Parameter names before torchvision 0.3 (`denselayer1.norm.1.weight`), and prefixes of DDP and torch.compile.
_OLD_NAME = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")
_WRAPPER_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")
_STATE_DICT_KEYS = ("state_dict_ema", "state_dict", "model_ema", "model")  # EMA weights first


@dataclass(frozen=True)
class LoadedWeights:
    """Result of loading a weights file. `head_loaded` is false if the classifier kept its random weights."""

    file: Path
    head_loaded: bool


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict on the CPU and converts its names to timm's. Executes no code from the file.

    Raises:
        UserError: The file is not a state dict, or loading it would run code.
    """
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be read as weights: {_first_line(error)}") from error
    except Exception as error:  # pickle's errors have no common class
        raise UserError(
            f"{file} contains more than weights, and loading it would run code: {_first_line(error)} Save its "
            f"state_dict() as safetensors."
        ) from error
    for name in _STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{file} does not contain a state dict (parameter names with tensors).")
    return {_OLD_NAME.sub(r"\1\2", _WRAPPER_PREFIX.sub("", name)): value for name, value in content.items()}


def load_weights(model: nn.Module, path: Path) -> LoadedWeights:
    """Loads weights into a model, from a file or from a folder with a model card.

    A classifier for another number of classes keeps its random weights.

    Raises:
        UserError: Parameter names are missing or unexpected, or shapes differ; the message lists them.
    """
    file = path / ModelCard.read(path).weights if path.is_dir() else path
    loaded, expected = read_weights(file), model.state_dict()
    classifier = _classifier_parameters(model)
    head_loaded = all(name in loaded and loaded[name].shape == expected[name].shape for name in classifier)
    if not head_loaded:
        loaded |= {name: expected[name] for name in classifier}
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # absent from old files
    problems = {
        "missing": [name for name in expected if name not in loaded and name not in counters],
        "unexpected": [name for name in loaded if name not in expected],
        "shape mismatch": [
            f"{name} {list(loaded[name].shape)} instead of {list(expected[name].shape)}"
            for name in expected
            if name in loaded and loaded[name].shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{file} does not fit the model: {text}. Set model.name to the model of this file.")
    model.load_state_dict({name: loaded.get(name, expected[name]) for name in expected})
    return LoadedWeights(file, head_loaded)


def load_model(folder: Path) -> nn.Module:
    """Loads the model of a checkpoint folder or of a downloaded registered model, in evaluation mode."""
    card = ModelCard.read(folder)
    import_model_code(card, folder)
    model = create(card.model, card.num_classes)
    load_weights(model, folder)
    return model.eval()


def import_model_code(card: ModelCard, folder: Path) -> None:
    """Imports the module that registers a model which plain timm lacks, if the card names one.

    Raises:
        UserError: The module cannot be imported.
    """
    module = card.architecture.get("module")
    try:
        if module is not None:
            importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"the model {card.name} in {folder} needs the module {module}, which cannot be imported ({error}): install "
            f"it, or add its folder to PYTHONPATH."
        ) from error


def load_teacher(folder: Path, classes: tuple[str, ...], in_chans: int) -> nn.Module:
    """Loads the teacher for knowledge distillation, with gradients disabled.

    Raises:
        UserError: The teacher has other classes or other input channels than the run.
    """
    if not folder.is_dir():
        raise UserError(
            f"loss.teacher={folder} is a weights file without class names: pass a checkpoint folder, a run, or "
            f"models:/NAME@ALIAS, which have class names."
        )
    card, model = ModelCard.read(folder), load_model(folder)
    if card.classes != classes:
        raise UserError(
            f"loss.teacher in {folder} has {len(card.classes)} classes ({listed(card.classes)}), the data have "
            f"{len(classes)} ({listed(classes)}): both lists must be the same."
        )
    if card.in_chans != in_chans:
        raise UserError(
            f"loss.teacher in {folder} expects images of {card.in_chans} channels, but model.in_chans={in_chans}: both "
            f"must be the same."
        )
    return model.requires_grad_(False)


def freeze(model: Any, finetune: Finetune) -> list[_BatchNorm]:
    """Disables gradients of the layers that fine-tuning freezes.

    Returns:
        The batch norms that must stay in evaluation mode.
    """
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


def lr_scales(model: Any, finetune: Finetune) -> dict[str, float]:
    """Returns learning rate multipliers by parameter name; parameters not listed have multiplier 1.

    Layer-wise learning rate decay: each layer group from the classifier down to the stem multiplies the learning rate
    by `layer_decay` once more. The groups are the classifier with the last norm, each dense block with its transition,
    and the stem (Bao et al. 2022, arXiv 2106.08254, with a dense block as a layer); in other models, timm's stages.
    `head_lr_mult` multiplies the classifier's learning rate.
    """
    scales: dict[str, float] = {}
    if finetune.layer_decay < 1:
        layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        last = max(layers.values())
        scales = {name: finetune.layer_decay ** (last - layer) for name, layer in layers.items()}
    if finetune.head_lr_mult != 1:
        scales |= {name: scales.get(name, 1) * finetune.head_lr_mult for name in _classifier_parameters(model)}
    return scales


def _classifier_parameters(model: Any) -> list[str]:
    """Returns the names of the classifier's parameters; some models have two classifiers."""
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else [classifier]
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if any(module is head for head in heads)
        for name, _ in module.named_parameters()
    ]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
