"""Dense blocks without concatenation: one buffer of features, and one operator for norm, ReLU and 1x1 convolution.

All features of a block are in one buffer in channels-last order, into which each layer writes its own channels. The
first half of a layer is one operator on the first C channels of the buffer, as a matrix X with a row for each of the M
pixels of all images:

    Y = max(0, (X - mean) scale + bias) W^T,    scale = weight / sqrt(variance + eps)

It neither copies X nor stores normalized activations: the backward pass recomputes them, as in Pleiss et al. 2017
(arXiv 1707.06990). The statistics of a feature map are computed once for all layers that read it. On CUDA the operator
is a pair of Triton kernels (`pipeline/model/fused_kernels.py`), elsewhere and in fp32 without TF32 it is PyTorch code.
`C` is the number of channels that a layer reads, `K` the number that its 1x1 convolution writes.
"""

import os
from typing import Any, cast

import torch
from timm.models.densenet import DenseBlock, DenseLayer
from torch import nn
from torch.autograd.function import once_differentiable

from pipeline.errors import UserError
from pipeline.model.dense_layers import second_half, update_running_stats


class FusedBlock(nn.ModuleDict):
    """Dense block on one buffer; parameters, their names and results are those of timm's `DenseBlock`.

    A layer whose first batch norm is frozen uses its running statistics. In evaluation mode timm's code runs.
    """

    def __init__(self, block: DenseBlock) -> None:
        super().__init__(block.items())

    @torch.compiler.disable
    def forward(self, first_NCHW: torch.Tensor) -> torch.Tensor:
        """Like timm's `DenseBlock.forward`: returns `first_NCHW` and all layers' features, in channels-last order.

        Under autocast the features have autocast's dtype.

        Raises:
            UserError: The features are on CUDA, and Triton is not installed.
        """
        if not self.training:
            return cast(torch.Tensor, DenseBlock.forward(self, first_NCHW))
        layers = cast(list[DenseLayer], list(self.values()))
        dtype, device = first_NCHW.dtype, first_NCHW.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        channels = layers[-1].norm1.num_features + layers[-1].conv2.out_channels
        shape_NCHW = (len(first_NCHW), channels, *first_NCHW.shape[2:])
        features_NCHW = torch.empty(shape_NCHW, dtype=dtype, device=device, memory_format=torch.channels_last)
        stats_2C = torch.zeros((2, channels), dtype=_accurate(dtype), device=device)
        measured = any(layer.norm1.training for layer in layers)
        new_NCHW = first_NCHW
        for layer in layers:
            norm, weight_KC11 = layer.norm1, layer.conv1.weight
            features_NCHW, stats_2C, reduced_NKHW = _FirstHalf.apply(
                features_NCHW, stats_2C, new_NCHW, norm.weight, norm.bias, weight_KC11, norm, measured
            )
            new_NCHW = second_half(layer, reduced_NKHW)
        return cast(torch.Tensor, _Append.apply(features_NCHW, new_NCHW))


class _FirstHalf(torch.autograd.Function):
    """Writes new features and their statistics into the buffers, then applies norm, ReLU and 1x1 convolution to all.

    Both buffers are modified in place, so the layers of a block form a chain in the graph: the backward pass of a layer
    gets the buffers' gradients from the next layer, adds its own in place, and passes them to the layer before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features_NCHW: torch.Tensor,
        stats_2C: torch.Tensor,
        new_NCHW: torch.Tensor,
        weight_C: torch.Tensor,
        bias_C: torch.Tensor,
        weight_KC11: torch.Tensor,
        norm: nn.BatchNorm2d,
        measured: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        end = norm.num_features
        new = slice(end - new_NCHW.shape[1], end)
        features_NCHW[:, new] = new_NCHW
        if measured:
            accurate_NCHW = features_NCHW[:, new].to(stats_2C.dtype)
            variance_C, mean_C = torch.var_mean(accurate_NCHW, dim=(0, 2, 3), correction=0)
            stats_2C[0, new], stats_2C[1, new] = mean_C, variance_C
        if norm.training:
            mean_C, variance_C = stats_2C[:, :end]
            update_running_stats(norm, mean_C, variance_C, features_NCHW[:, 0].numel())
        else:
            assert norm.running_mean is not None and norm.running_var is not None
            mean_C, variance_C = norm.running_mean.to(stats_2C.dtype), norm.running_var.to(stats_2C.dtype)
        inverse_C = torch.rsqrt(variance_C + norm.eps)
        scale_C = weight_C * inverse_C
        affine_3C = torch.stack((mean_C, scale_C, bias_C.to(scale_C.dtype)))
        weight_KC = weight_KC11.flatten(1).to(features_NCHW.dtype)
        reduced_MK = operator_for(features_NCHW).forward(_matrix(features_NCHW), affine_3C, weight_KC)
        # `.data` has a version of its own: later layers write to the buffers, but not to the channels that are read.
        ctx.save_for_backward(features_NCHW.data, stats_2C.data, affine_3C, inverse_C, weight_KC11)
        ctx.new, ctx.measured, ctx.uses_batch_stats = new, measured, norm.training
        ctx.mark_dirty(features_NCHW, stats_2C)
        samples, _, height, width = features_NCHW.shape
        return features_NCHW, stats_2C, reduced_MK.view(samples, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_NCHW: torch.Tensor, grad_2C: torch.Tensor, grad_NKHW: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        features_NCHW, stats_2C, affine_3C, inverse_C, weight_KC11 = ctx.saved_tensors
        needs_features = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        weight_KC = weight_KC11.flatten(1).to(features_NCHW.dtype)
        # No copies in a block's usual graph: there the gradient of the features is the copy that `_Append` made.
        grad_NCHW, grad_NKHW = (g.contiguous(memory_format=torch.channels_last) for g in (grad_NCHW, grad_NKHW))
        grad_MK = _matrix(grad_NKHW)
        grad_MC = _matrix(grad_NCHW) if needs_features else None
        matrices = _matrix(features_NCHW), affine_3C, weight_KC, grad_MK, grad_MC
        grad_scale_C, grad_bias_C, grad_weight_KC = operator_for(features_NCHW).backward(*matrices)
        parameters = grad_scale_C * inverse_C, grad_bias_C, grad_weight_KC[:, :, None, None], None, None
        if not needs_features:
            return None, None, None, *parameters
        if ctx.uses_batch_stats:
            scale_C = affine_3C[1]
            grad_2C[0, : ctx.new.stop] -= scale_C * grad_bias_C
            grad_2C[1, : ctx.new.stop] -= 0.5 * scale_C * inverse_C.square() * grad_scale_C
        new_grad_NCHW = grad_NCHW[:, ctx.new]
        if ctx.measured:
            # All layers that use these statistics have added to `grad_2C`. The gradients of mean and variance:
            count = features_NCHW[:, 0].numel()
            centered_NCHW = features_NCHW[:, ctx.new] - stats_2C[0, ctx.new, None, None]
            grad_mean_C11, grad_variance_C11 = grad_2C[:, ctx.new, None, None] / count
            new_grad_NCHW = new_grad_NCHW + torch.addcmul(grad_mean_C11, grad_variance_C11, centered_NCHW, value=2)
        return grad_NCHW, grad_2C, new_grad_NCHW.contiguous(memory_format=torch.channels_last), *parameters


class _Append(torch.autograd.Function):
    """Writes a block's last features into the buffer; in the backward pass, the first in the chain."""

    @staticmethod
    def forward(ctx: Any, features_NCHW: torch.Tensor, new_NCHW: torch.Tensor) -> torch.Tensor:
        ctx.new = slice(features_NCHW.shape[1] - new_NCHW.shape[1], None)
        features_NCHW[:, ctx.new] = new_NCHW
        ctx.mark_dirty(features_NCHW)
        return features_NCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A copy, because the layers add to it in place, and autograd may use the original elsewhere.
        grad_NCHW = grad_NCHW.clone(memory_format=torch.channels_last)
        return grad_NCHW, grad_NCHW[:, ctx.new].contiguous(memory_format=torch.channels_last)


class Eager:
    """The operator in PyTorch: the reference for the kernels, with the same rounding."""

    @staticmethod
    def forward(x_MC: torch.Tensor, affine_3C: torch.Tensor, weight_KC: torch.Tensor) -> torch.Tensor:
        """Norm, ReLU and 1x1 convolution.

        Args:
            x_MC: Features of dtype D. Columns beyond the C of the other arguments are not read.
            affine_3C: Mean, scale and bias, fp32; float64 if D is.
            weight_KC: Weight of the convolution, of dtype D.

        Returns:
            max(0, (x - mean) scale + bias) weight^T of dtype D, [M, K], with fp32 accumulation.
        """
        mean_C, scale_C, bias_C = affine_3C
        normalized_MC = torch.addcmul(bias_C, x_MC[:, : len(mean_C)] - mean_C, scale_C)
        return normalized_MC.relu_().to(x_MC.dtype) @ weight_KC.T

    @staticmethod
    def backward(
        x_MC: torch.Tensor,
        affine_3C: torch.Tensor,
        weight_KC: torch.Tensor,
        grad_MK: torch.Tensor,
        grad_MC: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of `forward` for the gradient of its result.

        Args:
            x_MC: As in `forward`.
            affine_3C: As in `forward`.
            weight_KC: As in `forward`.
            grad_MK: Gradient of the result, of dtype D.
            grad_MC: The gradient of x is added to its first C columns, in place; None: it is not computed.

        Returns:
            The gradients of scale [C], bias [C] and weight [K, C], in the dtype of `affine_3C`.
        """
        mean_C, scale_C, bias_C = affine_3C
        channels, dtype = len(mean_C), affine_3C.dtype
        centered_MC = x_MC[:, :channels] - mean_C
        normalized_MC = torch.addcmul(bias_C, centered_MC, scale_C)
        grad_MK = grad_MK.to(dtype)
        grad_normalized_MC = (grad_MK @ weight_KC.to(dtype)).masked_fill_(normalized_MC <= 0, 0)
        grad_weight_KC = grad_MK.T @ normalized_MC.relu_().to(x_MC.dtype).to(dtype)
        if grad_MC is not None:
            grad_MC[:, :channels] += grad_normalized_MC * scale_C
        return (grad_normalized_MC * centered_MC).sum(0), grad_normalized_MC.sum(0), grad_weight_KC


def operator_for(features_NCHW: torch.Tensor) -> Any:
    """Returns the kernels for 16-bit and TF32 features on CUDA, or for all in Triton's interpreter; `Eager` for others.

    The operator replaces a convolution, so cuDNN's switch decides on TF32.
    """
    dtype, interpreted = features_NCHW.dtype, os.environ.get("TRITON_INTERPRET") == "1"
    in_full_fp32 = dtype == torch.float32 and not torch.backends.cudnn.allow_tf32
    if dtype == torch.float64 or in_full_fp32 or not (features_NCHW.is_cuda or interpreted):
        return Eager
    try:
        from pipeline.model.fused_kernels import Kernels
    except ModuleNotFoundError as error:
        raise UserError(
            f"model.memory=fused needs the package {error.name} on GPUs, which is not installed: pip install triton, "
            f"or set model.memory to another mode."
        ) from error
    return Kernels


def _matrix(features_NCHW: torch.Tensor) -> torch.Tensor:
    """Views a tensor in channels-last order as a matrix [N H W, C]."""
    return features_NCHW.permute(0, 2, 3, 1).view(-1, features_NCHW.shape[1])


def _accurate(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of statistics for features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
