"""This project's DenseNet architectures by name; their parameter and FLOP counts by arithmetic."""

from dataclasses import dataclass
from typing import Any

from pipeline.config import Model

# Huang et al. 2017 (arXiv 1608.06993): table 1 (ImageNet), and the DenseNet-BC models of table 2 (CIFAR, 32 pixels),
# whose stem is one 3x3 convolution. L=22 and `densenet_tiny` are not in the paper; they are small enough for two CPU
# cores.
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

# Accuracies reported in the paper, in %: top-1 / top-5 on the ImageNet validation set, single crop; top-1 on CIFAR-10
# with standard augmentation.
PAPER_ACCURACY: dict[str, str] = {
    "densenet121": "ImageNet 74.98 / 92.29",
    "densenet169": "ImageNet 76.20 / 93.15",
    "densenet201": "ImageNet 77.42 / 93.66",
    "densenet264": "ImageNet 77.85 / 93.88",
    "densenet_bc_l100_k12": "CIFAR-10 95.49",
    "densenet_bc_l250_k24": "CIFAR-10 96.38",
    "densenet_bc_l190_k40": "CIFAR-10 96.54",
}


def non_default_options(model: Model) -> dict[str, Any]:
    """Returns the arguments of timm's model builder that differ from its defaults."""
    options = {"in_chans": (model.in_chans, 3), "global_pool": (model.global_pool, "avg")}
    return {key: value for key, (value, default) in options.items() if value != default}


@dataclass(frozen=True)
class Size:
    """Number of trainable parameters, and multiply-adds (MACs) of convolutions and linear layers for one image."""

    parameters: int
    multiply_adds: int


def size(model: Model | str, num_classes: int, side: int) -> Size:
    """Counts parameters and multiply-adds for an image of `side` x `side` pixels, layer by layer as in the paper.

    A dense layer is batch norm, 1x1 convolution to 4k channels, batch norm, 3x3 convolution to k channels (k: growth
    rate). A transition halves channels, height and width. Convolutions have no bias; batch norms have two parameters
    per channel.
    """
    model = Model(name=model) if isinstance(model, str) else model
    table = ARCHITECTURES[model.name]
    growth, blocks = table["growth_rate"], table["block_config"]
    parameters = multiply_adds = 0

    def convolution(inputs: int, outputs: int, kernel: int) -> None:
        nonlocal parameters, multiply_adds
        parameters += inputs * outputs * kernel**2
        multiply_adds += inputs * outputs * kernel**2 * side**2

    def norm(channels: int) -> None:
        nonlocal parameters
        parameters += 2 * channels

    channels = 2 * growth
    if table.get("stem_type") == "cifar":
        convolution(model.in_chans, channels, 3)
    else:
        side = (side - 1) // 2 + 1
        convolution(model.in_chans, channels, 7)
        norm(channels)
        side = (side - 1) // 2 + 1
    for number, layers in enumerate(blocks):
        if number:
            norm(channels)
            convolution(channels, channels // 2, 1)
            channels, side = channels // 2, side // 2
        for _ in range(layers):
            norm(channels)
            convolution(channels, 4 * growth, 1)
            norm(4 * growth)
            convolution(4 * growth, growth, 3)
            channels += growth
    norm(channels)
    pooled = channels * (2 if model.global_pool == "catavgmax" else 1)
    return Size(parameters + (pooled + 1) * num_classes, multiply_adds + pooled * num_classes)
