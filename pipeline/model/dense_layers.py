"""Parts of a dense layer that the memory modes share."""

import torch
from timm.models.densenet import DenseLayer
from torch import nn


def second_half(layer: DenseLayer, reduced_NCHW: torch.Tensor) -> torch.Tensor:
    """Second batch norm, ReLU, 3x3 convolution and dropout of a dense layer."""
    new_NCHW = layer.conv2(layer.norm2(reduced_NCHW))
    return nn.functional.dropout(new_NCHW, layer.drop_rate, layer.training)


@torch.no_grad()
def update_running_stats(norm: nn.BatchNorm2d, mean_C: torch.Tensor, variance_C: torch.Tensor, count: int) -> None:
    """Updates the running statistics as batch norm does, with the unbiased variance of `count` values."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean_C.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((variance_C * (count / max(1, count - 1))).to(norm.running_var.dtype), norm.momentum)
