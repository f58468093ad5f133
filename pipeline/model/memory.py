"""Activation checkpointing for dense blocks: stores fewer activations, recomputes them in the backward pass.

Parameters, their names and results equal those of timm's blocks. A dense layer reads the concatenation of all previous
feature maps, so storing the inputs of every layer's first batch norm and convolution takes memory quadratic in the
depth. Both memory modes store the feature maps only and recompute the rest in the backward pass (Pleiss et al. 2017,
arXiv 1707.06990).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.models import DenseNet
from timm.models.densenet import DenseBlock, DenseLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.config_fields import MemoryMode
from pipeline.model.dense_layers import second_half, update_running_stats
from pipeline.model.fused import FusedBlock


def apply_memory_mode(model: DenseNet, memory: MemoryMode) -> None:
    """Replaces the dense blocks of a model in place by those of a memory mode. Parameters stay the same objects."""
    if memory == "none":
        return
    blocks = {"activation-checkpointing": CheckpointBlock, "shared-stats": SharedStatsBlock, "fused": FusedBlock}
    new_block = blocks[memory]
    for name, block in list(model.features.named_children()):
        if isinstance(block, DenseBlock):
            setattr(model.features, name, new_block(block))


class CheckpointBlock(nn.ModuleDict):
    """Dense block with activation checkpointing.

    Recomputes each layer's concatenation, first batch norm, ReLU and 1x1 convolution in the backward pass instead of
    storing their inputs. Updates the running statistics once per step; timm's own checkpointing updates them in both
    passes.
    """

    def __init__(self, block: DenseBlock) -> None:
        super().__init__(block.items())

    def forward(self, first_NCHW: torch.Tensor) -> torch.Tensor:
        """Like timm's `DenseBlock.forward`: returns `first_NCHW` and all layers' features, concatenated."""
        features = [first_NCHW]
        for layer in self.values():
            features.append(self._layer(layer, features))
        return torch.cat(features, 1)

    def _layer(self, layer: DenseLayer, features: list[torch.Tensor]) -> torch.Tensor:
        def bottleneck(*features: torch.Tensor) -> torch.Tensor:
            return layer.conv1(layer.norm1(torch.cat(features, 1)))

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _frozen_running_stats(layer.norm1)

        if torch.is_grad_enabled():
            reduced_NCHW = checkpoint(bottleneck, *features, use_reentrant=False, context_fn=contexts)
        else:
            reduced_NCHW = bottleneck(*features)
        return second_half(layer, reduced_NCHW)


class SharedStatsBlock(nn.ModuleDict):
    """Activation checkpointing with shared batch statistics.

    Like `CheckpointBlock`, but computes mean and variance of each feature map once for all layers that read it. A
    layer's first batch norm and ReLU then are max(0, scale x + shift) per channel, in the forward pass and in the
    recomputation. A layer whose batch norm does not use batch statistics (evaluation, frozen batch norm) runs timm's
    code.
    """

    def __init__(self, block: DenseBlock) -> None:
        super().__init__(block.items())

    def forward(self, first_NCHW: torch.Tensor) -> torch.Tensor:
        """Like timm's `DenseBlock.forward`: returns `first_NCHW` and all layers' features, concatenated."""
        features = [first_NCHW]
        means: list[torch.Tensor] = []
        variances: list[torch.Tensor] = []
        for layer in self.values():
            assert isinstance(layer, DenseLayer)
            if not layer.norm1.training:
                features.append(layer(features))
                continue
            for feature_NCHW in features[len(means) :]:
                exact_NCHW = feature_NCHW if feature_NCHW.dtype == torch.float64 else feature_NCHW.float()
                variance_C, mean_C = torch.var_mean(exact_NCHW, dim=(0, 2, 3), correction=0)
                means.append(mean_C)
                variances.append(variance_C)
            features.append(self._layer(layer, features, torch.cat(means), torch.cat(variances)))
        return torch.cat(features, 1)

    def _layer(
        self, layer: DenseLayer, features: list[torch.Tensor], mean_C: torch.Tensor, variance_C: torch.Tensor
    ) -> torch.Tensor:
        norm = layer.norm1
        count = features[0].numel() // features[0].shape[1]
        update_running_stats(norm, mean_C.detach(), variance_C.detach(), count)
        scale_C = norm.weight * torch.rsqrt(variance_C + norm.eps)
        shift_C = norm.bias - mean_C * scale_C

        def bottleneck(scale_C: torch.Tensor, shift_C: torch.Tensor, *features: torch.Tensor) -> torch.Tensor:
            scale_C11, shift_C11 = scale_C[:, None, None], shift_C[:, None, None]
            return layer.conv1(torch.addcmul(shift_C11, torch.cat(features, 1), scale_C11).relu_())

        if torch.is_grad_enabled():
            reduced_NCHW = checkpoint(bottleneck, scale_C, shift_C, *features, use_reentrant=False)
        else:
            reduced_NCHW = bottleneck(scale_C, shift_C, *features)
        return second_half(layer, reduced_NCHW)


@contextmanager
def _frozen_running_stats(norm: nn.BatchNorm2d) -> Iterator[None]:
    """Lets a batch norm use batch statistics without updating its running statistics."""
    momentum, norm.momentum = norm.momentum, 0.0
    try:
        yield
    finally:
        norm.momentum = momentum
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.sub_(1)
