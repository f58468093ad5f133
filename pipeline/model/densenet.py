"""DenseNets by name, through timm's registry and on timm's own `DenseNet` class.

`densenet264` is the paper's (growth rate 32); timm's `densenet264d` is another model (growth rate 48, deep stem).
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import DenseNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.densenet import _cfg, _create_densenet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Model
from pipeline.errors import ConfigError
from pipeline.model.memory import save_memory

# Huang et al. 2017 (arXiv 1608.06993), table 1, and the DenseNet-BC of table 2 for pictures of 32 pixels, whose stem is
# one 3x3 convolution. L=22 is not in the paper, and `densenet_tiny` is neither: they are for two CPU cores.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "densenet121": {"growth_rate": 32, "block_config": (6, 12, 24, 16)},
    "densenet169": {"growth_rate": 32, "block_config": (6, 12, 32, 32)},
    "densenet201": {"growth_rate": 32, "block_config": (6, 12, 48, 32)},
    "densenet264": {"growth_rate": 32, "block_config": (6, 12, 64, 48)},
    "densenet_bc_l22_k12": {"growth_rate": 12, "block_config": (3, 3, 3), "stem_type": "cifar"},
    "densenet_bc_l40_k12": {"growth_rate": 12, "block_config": (6, 6, 6), "stem_type": "cifar"},
    "densenet_bc_l100_k12": {"growth_rate": 12, "block_config": (16, 16, 16), "stem_type": "cifar"},
    "densenet_bc_l250_k24": {"growth_rate": 24, "block_config": (41, 41, 41), "stem_type": "cifar"},
    "densenet_bc_l190_k40": {"growth_rate": 40, "block_config": (31, 31, 31), "stem_type": "cifar"},
    "densenet_tiny": {"growth_rate": 12, "block_config": (3, 3, 3)},
}

# The accuracies that the paper reports, in %: top-1 and top-5 on ImageNet's validation images, single crop; top-1 on
# CIFAR-10 with standard augmentation.
PAPER: dict[str, str] = {
    "densenet121": "ImageNet 74.98 / 92.29",
    "densenet169": "ImageNet 76.20 / 93.15",
    "densenet201": "ImageNet 77.42 / 93.66",
    "densenet264": "ImageNet 77.85 / 93.88",
    "densenet_bc_l100_k12": "CIFAR-10 95.49",
    "densenet_bc_l250_k24": "CIFAR-10 96.38",
    "densenet_bc_l190_k40": "CIFAR-10 96.54",
}


class CifarDenseNet(DenseNet):
    """timm's DenseNet with the paper's stem for small pictures: one 3x3 convolution, neither norm nor pooling."""

    def __init__(self, growth_rate: int, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(growth_rate=growth_rate, in_chans=in_chans, **kwargs)
        self.features.conv0 = nn.Conv2d(in_chans, 2 * growth_rate, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.features.conv0.weight)
        del self.features.norm0, self.features.pool0
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)
        self.feature_info[0]["module"] = "features.conv0"
        names = [name for name, _ in self.features.named_children()]
        self.feature_ends = [names.index(info["module"].split(".", 1)[1]) for info in self.feature_info]


_SMALL = {"input_size": (3, 32, 32), "pool_size": (8, 8), "crop_pct": 1.0}
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": _cfg(**(_SMALL if architecture.get("stem_type") == "cifar" else {}))
        for name, architecture in ARCHITECTURES.items()
        if name not in timm.list_models()
    }
)


def _entry_point(name: str) -> Callable[..., DenseNet]:
    """A function for timm's registry; `pretrained=True` is refused by timm, for there are no public weights."""

    def build(pretrained: bool = False, **kwargs: Any) -> DenseNet:
        architecture = dict(ARCHITECTURES[name])
        if architecture.pop("stem_type", "") == "cifar":
            features = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3)}
            return build_model_with_cfg(CifarDenseNet, name, pretrained, feature_cfg=features, **architecture, **kwargs)
        return _create_densenet(name, pretrained=pretrained, **architecture, **kwargs)

    build.__name__ = name
    build.__module__ = __name__
    return build


for _name in (cfg.removesuffix(".untrained") for cfg in list(default_cfgs)):
    register_model(_entry_point(_name))


def check_name(name: str) -> None:
    """Raises `ConfigError` with the nearest names when no DenseNet is called `name`."""
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"model.name='{name}' is not known.{hint} Known: {', '.join(ARCHITECTURES)}.")


def create(model: Model | str, num_classes: int) -> DenseNet:
    """Builds a DenseNet with He-initialised convolutions (He et al. 2015, fan-in), in fp32 on torch's default device.

    Args:
        model: The config's section, or a name, which stands for the section's defaults.
        num_classes: The number of logits.

    Returns:
        A module mapping images [N, 3, H, W] to logits [N, num_classes].

    Raises:
        ConfigError: the name is unknown.
    """
    model = Model(name=model) if isinstance(model, str) else model
    check_name(model.name)
    net = timm.create_model(
        model.name,
        num_classes=num_classes,
        drop_rate=model.drop_rate,
        proj_drop_rate=model.layer_drop_rate,
        **_unusual(model),
    )
    save_memory(net, model.memory)
    return net


def architecture(model: Model) -> dict[str, Any]:
    """What builds the same network anew, for the model's card: numbers of layers, channels, pooling."""
    return ARCHITECTURES[model.name] | _unusual(model)


def _unusual(model: Model) -> dict[str, Any]:
    options = {"in_chans": (model.in_chans, 3), "global_pool": (model.global_pool, "avg")}
    return {key: value for key, (value, usual) in options.items() if value != usual}


@dataclass(frozen=True)
class Size:
    """A model's trainable parameters, and multiply-adds of its convolutions and linear layers for one picture."""

    parameters: int
    multiply_adds: int


def size(model: Model | str, num_classes: int, side: int) -> Size:
    """Counts parameters and multiply-adds for a picture of `side` x `side` pixels, without allocating either."""
    with torch.device("meta"):
        net = create(model, num_classes).eval()
        channels = 3 if isinstance(model, str) else model.in_chans
        image_1CHW = torch.empty(1, channels, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image_1CHW)
    return Size(sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2)
