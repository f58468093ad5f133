"""Step that measures the fused operator next to timm's batch norm, ReLU and 1x1 convolution, layer by layer."""

from collections.abc import Callable

import torch
from timm.models.densenet import DenseLayer

from benchmarks.common import interleaved, seconds
from benchmarks.gpu.context import Context, synchronize
from pipeline.model.fused import Eager, operator_for

GROWTH, BATCH, REPEATS = 32, 256, 10
# DenseNet-121 at 224 pixels: side of the feature maps, and the channels that the block's first and last layer read.
LAYERS = {56: (64, 224), 28: (128, 480), 14: (256, 992), 7: (512, 992)}
TINY_LAYERS = {4: (64, 96)}
TOLERANCE = 0.02  # largest difference of bf16 results and gradients, relative to the largest value


def fused(context: Context) -> None:
    """Compares each layer's results with the operator in PyTorch, and its times with timm's layer, in bf16.

    The operator gets mean and variance, which a block computes once for all layers; timm's layer gets features that are
    concatenated already, and computes mean and variance.
    """
    for side, (first, last) in (TINY_LAYERS if context.tiny else LAYERS).items():
        for channels in (first, last):
            _layer(context, 2 if context.tiny else BATCH, side, channels, last + GROWTH)


def _layer(context: Context, batch: int, side: int, channels: int, block_channels: int) -> None:
    torch.manual_seed(3)
    device = context.torch_device
    layer = DenseLayer(channels, GROWTH, bn_size=4, device=device).to(memory_format=torch.channels_last)
    features_MC = torch.randn(batch * side * side, block_channels, device=device).bfloat16()
    grad_MC, weight_KC = torch.zeros_like(features_MC), layer.conv1.weight.detach().flatten(1).bfloat16()
    grad_MK = torch.randn(len(features_MC), len(weight_KC), device=device).bfloat16()
    affine_3C = torch.stack([torch.zeros(channels), torch.ones(channels), torch.zeros(channels)]).to(device)
    operator = operator_for(features_MC)

    def images_of(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.view(batch, side, side, -1).permute(0, 3, 1, 2)

    first_NCHW = images_of(features_MC[:, :channels].contiguous()).requires_grad_()

    def fused_forward() -> torch.Tensor:
        return operator.forward(features_MC, affine_3C, weight_KC)

    def plain_forward() -> torch.Tensor:
        with torch.autocast(context.device, torch.bfloat16):
            return layer.conv1(layer.norm1(first_NCHW))

    def fused_both() -> None:
        fused_forward()
        operator.backward(features_MC, affine_3C, weight_KC, grad_MK, grad_MC)

    def plain_both() -> None:
        plain_forward().backward(images_of(grad_MK))

    added_MC, expected_MC = torch.zeros_like(grad_MC), torch.zeros_like(grad_MC)
    found = [fused_forward(), *operator.backward(features_MC, affine_3C, weight_KC, grad_MK, added_MC), added_MC]
    expected = [Eager.forward(features_MC, affine_3C, weight_KC)]
    expected += [*Eager.backward(features_MC, affine_3C, weight_KC, grad_MK, expected_MC), expected_MC]
    names = ("result", "scale", "bias", "weight", "features")
    differences = {
        name: ((a - b).abs().max() / b.abs().max()).item() for name, a, b in zip(names, found, expected, strict=True)
    }
    title = f"norm, ReLU and 1x1 convolution of {channels} channels, {side} px, batch {batch}, bf16"
    context.record(layer=title, differences=differences)
    if not max(differences.values()) < TOLERANCE:
        raise AssertionError(f"{title}: the kernels differ from PyTorch by {differences}, more than {TOLERANCE}")
    del found, expected, added_MC, expected_MC
    for name, cases in {
        "forward pass": {"fused": fused_forward, "plain": plain_forward},
        "forward and backward pass": {"fused": fused_both, "plain": plain_both},
    }.items():
        timed = {case: _milliseconds(function) for case, function in cases.items()}
        context.compare(f"{name}, {title}", interleaved(timed, context.rounds), "ms", "fused")


def _milliseconds(function: Callable[[], object]) -> Callable[[], float]:
    """Returns a function that measures the mean time of a call."""

    def repeated() -> None:
        for _ in range(REPEATS):
            function()
        synchronize()

    def measured() -> float:
        synchronize()
        return seconds(repeated) / REPEATS * 1000

    return measured
