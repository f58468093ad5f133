"""Supports any image classifier of timm's registry as `model.name`: name check, config check, model size.

Importing timm and torch takes seconds, so functions import them only for models that are not this project's DenseNets.
"""

import difflib
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.config import Model, RunConfig
from pipeline.errors import ConfigError
from pipeline.model.architectures import ARCHITECTURES, Size, non_default_options
from pipeline.model.architectures import size as densenet_size

if TYPE_CHECKING:
    from torch import nn


def check_name(name: str) -> None:
    """Raises `ConfigError` with the closest match if neither timm nor this project has a model called `name`."""
    if name in ARCHITECTURES:
        return
    import timm

    known = [*ARCHITECTURES, *timm.list_models()]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ConfigError(
            f"model.name='{name}' is not known.{hint} Known: {', '.join(ARCHITECTURES)}, and the names of "
            f"timm.list_models(), without the tags of weights."
        )


def check_model(config: RunConfig) -> None:
    """Checks that the model supports the config. Models outside this project are built on the meta device for it.

    Raises:
        ConfigError: The name is unknown, the model does not accept the image size, does not return logits, or lacks
            the layers that another config key applies to.
    """
    model, finetune = config.model, config.finetune
    check_name(model.name)
    if model.name in ARCHITECTURES:
        return
    from timm.models import DenseNet
    from torch.nn.modules.batchnorm import _BatchNorm

    from pipeline.model.weights import lr_scales

    network = _meta_model(model, num_classes=2)
    for key, side in _image_sizes(config):
        problem = _forward_error(network, model, side)
        if problem is not None:
            default = getattr(network, "pretrained_cfg", {}).get("input_size", ("unknown",))[-1]
            raise ConfigError(
                f"{key}={side} does not fit model.name={model.name} ({problem}): set data.image_size and eval.crop to "
                f"a size that it accepts; its default size is {default}."
            )
    if finetune.freeze_blocks and not isinstance(network, DenseNet):
        raise _unsupported("finetune.freeze_blocks", finetune.freeze_blocks, model, "dense blocks")
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        for key, value in (
            ("finetune.freeze_batch_norm", finetune.freeze_batch_norm),
            ("engine.sync_batch_norm", config.engine.sync_batch_norm),
        ):
            if value:
                raise _unsupported(key, "true", model, "batch norm")
    if finetune.layer_decay < 1:
        try:
            lr_scales(network, finetune)
        except Exception as error:  # models without timm's group_matcher raise errors of many kinds
            raise _unsupported("finetune.layer_decay", finetune.layer_decay, model, "ordered layer groups") from error


def _image_sizes(config: RunConfig) -> list[tuple[str, int]]:
    """Returns all image sizes in pixels that the config uses, each with its config key."""
    sides = [("data.image_size", config.data.image_size), ("eval.crop", config.eval.crop)]
    return [*sides, *(("data.progressive_resize", side) for _, side in config.data.progressive_resize)]


def _forward_error(network: "nn.Module", model: Model, side: int) -> str | None:
    """Returns why the model has no logits for an image of `side` x `side` pixels; None if the forward pass works."""
    import torch

    try:
        with torch.no_grad():
            logits_BK = network(torch.empty(1, model.in_chans, side, side, device="meta"))
    except Exception as error:  # models validate their input in many ways, or not at all
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    shape = tuple(logits_BK.shape) if isinstance(logits_BK, torch.Tensor) else type(logits_BK).__name__
    return None if shape == (1, 2) else f"it returns {shape} for one image and two classes"


def _unsupported(key: str, value: object, model: Model, what: str) -> ConfigError:
    return ConfigError(
        f"{key}={value} applies to models with {what} only, and model.name={model.name} has none: remove it."
    )


def _meta_model(model: Model, num_classes: int) -> Any:
    """Creates the model on torch's `meta` device in evaluation mode: shapes only, no memory for weights."""
    import torch

    from pipeline.model.densenet import create

    with torch.device("meta"):
        return create(model, num_classes).eval()


def architecture(model: Model) -> dict[str, Any]:
    """Returns the arguments that rebuild the model, for its model card.

    For this project's DenseNets: growth rate, block config and stem. For other models: `timm` with the registry name,
    and `module` with the module to import if plain timm lacks that name.
    """
    if model.name in ARCHITECTURES:
        return ARCHITECTURES[model.name] | non_default_options(model)
    from timm.models import model_entrypoint

    arguments: dict[str, Any] = {"timm": model.name}
    module = model_entrypoint(model.name).__module__
    if module.split(".")[0] != "timm":
        arguments["module"] = module
    return arguments | non_default_options(model)


def is_stochastic(model: Model) -> bool:
    """Whether a forward pass in training draws random numbers (dropout, drop path).

    Other models of timm count as stochastic, since some use drop path by default.
    """
    return model.drop_rate > 0 or model.layer_drop_rate > 0 or model.name not in ARCHITECTURES


@cache
def size(model: Model, num_classes: int, side: int) -> Size:
    """Returns parameters and multiply-adds for an image of `side` x `side` pixels.

    By arithmetic for this project's DenseNets. Other models run on the meta device under torch's FLOP counter, which
    counts convolutions, matrix products and attention.
    """
    if model.name in ARCHITECTURES:
        return densenet_size(model, num_classes, side)
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = _meta_model(model, num_classes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, model.in_chans, side, side, device="meta"))
    return Size(sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)
