"""Triton kernels for norm, ReLU and 1x1 convolution; `pipeline.model.fused.Eager` defines the operator.

A tile is BM rows by BC channels; BK, the number of output channels as a power of two, is not tiled. No kernel uses
atomics, and tile sizes depend on dtype and shape only, so that results are the same bit for bit at each start. Products
of fp32 values are in TF32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SPLIT_PROGRAMS = 256  # backward programs, about: two for each multiprocessor of an A100 or H100


@dataclass(frozen=True)
class Tiles:
    """Tile sizes, warps and pipeline stages of a kernel."""

    rows: int
    channels: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """The kernel's arguments for these."""
        return {"BM": self.rows, "BC": self.channels, "num_warps": self.num_warps, "num_stages": self.num_stages}


# By bytes per value. They compile without register spills for sm_80, sm_90 and sm_100 (tests/model/test_fused.py).
FORWARD = {2: Tiles(128, 32, 8, 3), 4: Tiles(64, 32, 8, 2)}
BACKWARD = {2: Tiles(64, 32, 8, 2), 4: Tiles(32, 16, 8, 2)}


@triton.jit
def forward_kernel(
    x, affine, weight, y, M, C, K, x_stride,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Writes a tile of rows of max(0, (x - mean) scale + bias) weight^T; x is [M, C] with `x_stride` between rows."""
    first_row = tl.program_id(0).to(tl.int64) * BM  # only offsets within a tile fit into 32 bits
    x += first_row * x_stride
    y += first_row * K
    rows = tl.arange(0, BM)[:, None]
    in_rows = rows < M - first_row
    outputs = tl.arange(0, BK)[None, :]
    sums = tl.zeros((BM, BK), tl.float32)
    for first in range(0, C, BC):
        columns = first + tl.arange(0, BC)
        inside = columns < C
        x_tile = tl.load(x + rows * x_stride + columns[None, :], mask=in_rows & inside[None, :], other=0.0)
        weight_mask = inside[:, None] & (outputs < K)
        weight_tile = tl.load(weight + outputs * C + columns[:, None], mask=weight_mask, other=0.0)
        mean = tl.load(affine + columns, mask=inside, other=0.0)
        scale = tl.load(affine + C + columns, mask=inside, other=0.0)
        bias = tl.load(affine + 2 * C + columns, mask=inside, other=0.0)
        normalized = (x_tile.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
        activated = tl.where(normalized <= 0, 0.0, normalized).to(x_tile.dtype)  # not `maximum`: NaN stays NaN
        sums = tl.dot(activated, weight_tile, sums, input_precision="tf32")
    tl.store(y + rows * K + outputs, sums.to(y.dtype.element_ty), mask=in_rows & (outputs < K))


@triton.jit
def backward_kernel(
    x, affine, weight, y_grad, x_grad, scale_sums, bias_sums, weight_sums, M, C, K, x_stride, rows_per_split,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of BC channels over a split of the rows.

    Adds the gradient of x to `x_grad` if ADD; writes the sums over the split's rows for scale and bias, [splits, C],
    and weight, [splits, K, C].
    """
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    split = tl.program_id(1).to(tl.int64)
    inside = columns < C
    outputs = tl.arange(0, BK)
    weight_mask = (outputs < K)[:, None] & inside[None, :]
    weight_tile = tl.load(weight + outputs[:, None] * C + columns[None, :], mask=weight_mask, other=0.0)
    mean = tl.load(affine + columns, mask=inside, other=0.0)[None, :]
    scale = tl.load(affine + C + columns, mask=inside, other=0.0)[None, :]
    bias = tl.load(affine + 2 * C + columns, mask=inside, other=0.0)[None, :]
    # Sums over the rows of all tiles; those over the rows of a tile follow after the loop.
    scale_tile = tl.zeros((BM, BC), tl.float32)
    bias_tile = tl.zeros((BM, BC), tl.float32)
    weight_grad = tl.zeros((BK, BC), tl.float32)
    first_row = split * rows_per_split  # only offsets within a split fit into 32 bits
    x += first_row * x_stride
    x_grad += first_row * x_stride
    y_grad += first_row * K
    rows_left = tl.minimum(rows_per_split, M - first_row).to(tl.int32)
    for first in range(0, rows_left, BM):
        rows = first + tl.arange(0, BM)[:, None]
        x_offsets = rows * x_stride + columns[None, :]
        x_mask = (rows < rows_left) & inside[None, :]
        x_tile = tl.load(x + x_offsets, mask=x_mask, other=0.0)
        y_mask = (rows < rows_left) & (outputs < K)[None, :]
        y_tile = tl.load(y_grad + rows * K + outputs[None, :], mask=y_mask, other=0.0)
        centered = x_tile.to(tl.float32) - mean
        normalized = centered * scale + bias
        normalized_grad = tl.dot(y_tile, weight_tile, input_precision="tf32")
        normalized_grad = tl.where(normalized <= 0, 0.0, normalized_grad)
        bias_tile += normalized_grad
        scale_tile += normalized_grad * centered
        activated = tl.where(normalized <= 0, 0.0, normalized).to(x_tile.dtype)
        weight_grad = tl.dot(tl.trans(y_tile), activated, weight_grad, input_precision="tf32")
        if ADD:
            added = tl.load(x_grad + x_offsets, mask=x_mask, other=0.0).to(tl.float32) + normalized_grad * scale
            tl.store(x_grad + x_offsets, added.to(x_grad.dtype.element_ty), mask=x_mask)
    tl.store(scale_sums + split * C + columns, tl.sum(scale_tile, 0), mask=inside)
    tl.store(bias_sums + split * C + columns, tl.sum(bias_tile, 0), mask=inside)
    tl.store(weight_sums + (split * K + outputs[:, None]) * C + columns[None, :], weight_grad, mask=weight_mask)


class Kernels:
    """The operator on CUDA, or in Triton's interpreter: arguments and results as for `pipeline.model.fused.Eager`."""

    @staticmethod
    def forward(x_MC: torch.Tensor, affine_3C: torch.Tensor, weight_KC: torch.Tensor) -> torch.Tensor:
        """Runs `forward_kernel`."""
        rows, (outputs, channels) = len(x_MC), weight_KC.shape
        y_MK = x_MC.new_empty(rows, outputs)
        tiles = FORWARD[x_MC.element_size()]
        with torch.cuda.device_of(x_MC):
            forward_kernel[(triton.cdiv(rows, tiles.rows),)](
                x_MC, affine_3C, weight_KC, y_MK, rows, channels, outputs, x_MC.stride(0),
                BK=padded(outputs), **tiles.options,
            )  # fmt: skip
        return y_MK

    @staticmethod
    def backward(
        x_MC: torch.Tensor,
        affine_3C: torch.Tensor,
        weight_KC: torch.Tensor,
        grad_MK: torch.Tensor,
        grad_MC: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs `backward_kernel`, and adds the sums of its splits."""
        rows, (outputs, channels) = len(x_MC), weight_KC.shape
        tiles = BACKWARD[x_MC.element_size()]
        channel_tiles, row_tiles = triton.cdiv(channels, tiles.channels), triton.cdiv(rows, tiles.rows)
        splits = min(row_tiles, triton.cdiv(SPLIT_PROGRAMS, channel_tiles))
        rows_per_split = triton.cdiv(row_tiles, splits) * tiles.rows
        splits = triton.cdiv(rows, rows_per_split)
        sums_2SC = affine_3C.new_empty(2, splits, channels)
        weight_sums_SKC = affine_3C.new_empty(splits, outputs, channels)
        with torch.cuda.device_of(x_MC):
            backward_kernel[(channel_tiles, splits)](
                x_MC, affine_3C, weight_KC, grad_MK, x_MC if grad_MC is None else grad_MC, sums_2SC[0], sums_2SC[1],
                weight_sums_SKC, rows, channels, outputs, x_MC.stride(0), rows_per_split,
                BK=padded(outputs), ADD=grad_MC is not None, **tiles.options,
            )  # fmt: skip
        return *sums_2SC.sum(1), weight_sums_SKC.sum(0)


def padded(outputs: int) -> int:
    """Returns the power of two that holds a number of output channels; `tl.dot` needs 16 or more."""
    return max(16, triton.next_power_of_2(outputs))
