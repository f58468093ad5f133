"""DenseNets by name, through timm's registry and on timm's own `DenseNet` class.

`densenet264` is the paper's (growth rate 32); timm's `densenet264d` is another model (growth rate 48, deep stem).
"""

import difflib
from typing import Any

import timm
import torch
from timm.models import DenseNet, generate_default_cfgs, register_model
from timm.models.densenet import _cfg, _create_densenet

from pipeline.errors import ConfigError

# Huang et al. 2017, table 1 (arXiv 1608.06993); `densenet_tiny` is for demonstrations on pictures of 32 pixels.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "densenet121": {"growth_rate": 32, "block_config": (6, 12, 24, 16)},
    "densenet169": {"growth_rate": 32, "block_config": (6, 12, 32, 32)},
    "densenet201": {"growth_rate": 32, "block_config": (6, 12, 48, 32)},
    "densenet264": {"growth_rate": 32, "block_config": (6, 12, 64, 48)},
    "densenet_tiny": {"growth_rate": 12, "block_config": (3, 3, 3)},
}


default_cfgs = generate_default_cfgs({"densenet264.untrained": _cfg(), "densenet_tiny.untrained": _cfg()})


@register_model
def densenet264(pretrained: bool = False, **kwargs: Any) -> DenseNet:
    """DenseNet-264 with growth rate 32. There are no public weights: `pretrained=True` is refused by timm."""
    return _create_densenet("densenet264", pretrained=pretrained, **ARCHITECTURES["densenet264"], **kwargs)


@register_model
def densenet_tiny(pretrained: bool = False, **kwargs: Any) -> DenseNet:
    """A DenseNet of nine dense layers, 75 thousand parameters with 10 classes."""
    return _create_densenet("densenet_tiny", pretrained=pretrained, **ARCHITECTURES["densenet_tiny"], **kwargs)


def check_name(name: str) -> None:
    """Raises `ConfigError` with the nearest names when no DenseNet is called `name`."""
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"model.name='{name}' is not known.{hint} Known: {', '.join(ARCHITECTURES)}.")


def create(name: str, num_classes: int) -> DenseNet:
    """Builds a DenseNet with He-initialised convolutions, in fp32 on torch's default device.

    Returns:
        A module mapping images [N, 3, H, W] to logits [N, num_classes].

    Raises:
        ConfigError: the name is unknown.
    """
    check_name(name)
    return timm.create_model(name, num_classes=num_classes)


def parameter_count(name: str, num_classes: int) -> int:
    """Counts the trainable parameters without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in create(name, num_classes).parameters())
