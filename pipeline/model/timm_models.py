"""Any image classifier of timm's registry as `model.name`: is it known, does the config fit it, how large is it.

timm and torch take seconds to import, so they are where a name is not one of this project's DenseNets alone.
"""

import difflib
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.config import Model, RunConfig
from pipeline.errors import ConfigError
from pipeline.model.architectures import ARCHITECTURES, Size, unusual
from pipeline.model.architectures import size as counted

if TYPE_CHECKING:
    from torch import nn


def check_name(name: str) -> None:
    """Raises `ConfigError` with the nearest name when neither timm nor this project has a model called `name`."""
    if name in ARCHITECTURES:
        return
    import timm

    known = [*ARCHITECTURES, *timm.list_models()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(
            f"model.name='{name}' is not known.{hint} Known: {', '.join(ARCHITECTURES)}, and the names of "
            f"timm.list_models(), without the tags of weights."
        )


def check_model(config: RunConfig) -> None:
    """Looks whether the model does what the config asks of it; one that is not of this project is built, without data.

    Raises:
        ConfigError: the name is unknown, the model does not take images of that size, gives no logits, or has not what
            other keys are about.
    """
    model, finetune = config.model, config.finetune
    check_name(model.name)
    if model.name in ARCHITECTURES:
        return
    from timm.models import DenseNet
    from torch.nn.modules.batchnorm import _BatchNorm

    from pipeline.model.weights import rate_factors

    network = _without_data(model, num_classes=2)
    for key, side in _sides(config):
        problem = _problem(network, model, side)
        if problem is not None:
            usual = getattr(network, "pretrained_cfg", {}).get("input_size", ("unknown",))[-1]
            raise ConfigError(
                f"{key}={side} does not fit model.name={model.name} ({problem}): set data.image_size and eval.crop to "
                f"what it takes; its own size is {usual}."
            )
    if finetune.freeze_blocks and not isinstance(network, DenseNet):
        raise _refused("finetune.freeze_blocks", finetune.freeze_blocks, model, "dense blocks")
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        for key, value in (
            ("finetune.freeze_batch_norm", finetune.freeze_batch_norm),
            ("engine.sync_batch_norm", config.engine.sync_batch_norm),
        ):
            if value:
                raise _refused(key, "true", model, "batch norm")
    if finetune.layer_decay < 1:
        try:
            rate_factors(network, finetune)
        except Exception as error:  # models tell in many ways that timm knows no order of their layers
            raise _refused("finetune.layer_decay", finetune.layer_decay, model, "layers in an order") from error


def _sides(config: RunConfig) -> list[tuple[str, int]]:
    """The sides of all images that the model will get, each with the key that asks for it."""
    sides = [("data.image_size", config.data.image_size), ("eval.crop", config.eval.crop)]
    return [*sides, *(("data.progressive_resize", side) for _, side in config.data.progressive_resize)]


def _problem(network: "nn.Module", model: Model, side: int) -> str | None:
    """Why the model gives no logits for an image of that side; None where it does."""
    import torch

    try:
        with torch.no_grad():
            logits_BK = network(torch.empty(1, model.in_chans, side, side, device="meta"))
    except Exception as error:  # models check their input in many ways, or not at all
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    shape = tuple(logits_BK.shape) if isinstance(logits_BK, torch.Tensor) else type(logits_BK).__name__
    return None if shape == (1, 2) else f"it gives {shape} for one image and two classes"


def _refused(key: str, value: object, model: Model, what: str) -> ConfigError:
    return ConfigError(f"{key}={value} is of models with {what}, and model.name={model.name} has none: leave it out.")


def _without_data(model: Model, num_classes: int) -> Any:
    """The model on torch's device `meta`, in evaluation mode: shapes and no numbers, so it takes a moment."""
    import torch

    from pipeline.model.densenet import create

    with torch.device("meta"):
        return create(model, num_classes).eval()


def architecture(model: Model) -> dict[str, Any]:
    """What builds the same model anew, for the model's card: a DenseNet's numbers, or `timm` with a name of its registry.

    `module` says what has to be imported for that name, where plain timm does not have it.
    """
    if model.name in ARCHITECTURES:
        return ARCHITECTURES[model.name] | unusual(model)
    from timm.models import model_entrypoint

    made: dict[str, Any] = {"timm": model.name}
    module = model_entrypoint(model.name).__module__
    if module.split(".")[0] != "timm":
        made["module"] = module
    return made | unusual(model)


def draws(model: Model) -> bool:
    """Whether a forward pass in training draws random numbers; models of timm may drop paths without being asked."""
    return model.drop_rate > 0 or model.layer_drop_rate > 0 or model.name not in ARCHITECTURES


@cache
def size(model: Model, num_classes: int, side: int) -> Size:
    """Parameters, and multiply-adds for an image of `side` x `side` pixels: arithmetic for this project's DenseNets.

    Other models are run without data, and what torch's counter knows (convolutions, matrix products, attention) counts.
    """
    if model.name in ARCHITECTURES:
        return counted(model, num_classes, side)
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = _without_data(model, num_classes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, model.in_chans, side, side, device="meta"))
    return Size(sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)
