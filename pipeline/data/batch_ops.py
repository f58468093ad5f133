"""Batch augmentations on the device: color jitter, random erasing, mixup and CutMix, with random numbers from the plan.

The number of kernels does not depend on the batch size, and nothing synchronizes the host with the device.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.config_fields import Rgb
from pipeline.data.augment import Augmentations, Color, Erase, Mix
from pipeline.data.philox import Ints
from pipeline.extension_points import AUGMENTATIONS

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision
_NOISE_STARTS = 2**22  # possible offsets of an image's noise in the noise sequence


def apply(
    images_NCHW: torch.Tensor,
    labels_N: torch.Tensor,
    planned: Augmentations,
    *,
    num_classes: int,
    mean: Rgb,
    std: Rgb,
    erase_fill: Literal["mean", "noise"],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augments normalized images; returns images and targets.

    Targets are the labels (int64, [N]); with mixup or CutMix they are soft targets (fp32, [N, classes]).
    """
    if planned.color is not None:
        images_NCHW = color(images_NCHW, planned.color, mean, std)
    if planned.erase is not None:
        images_NCHW = erase(images_NCHW, planned.erase, erase_fill)
    for name, random_B4 in planned.custom.items():
        images_NCHW = AUGMENTATIONS[name](images_NCHW, _to_device_of(random_B4, images_NCHW))
    if planned.mix is not None:
        return mix(images_NCHW, labels_N, planned.mix, num_classes)
    return images_NCHW, labels_N


def color(images_NCHW: torch.Tensor, planned: Color, mean: Rgb, std: Rgb) -> torch.Tensor:
    """Applies color jitter (brightness, contrast, saturation) and PCA lighting, as fb.resnet.torch.

    fb.resnet.torch applies the three in random order without clamping. Without clamping the order does not matter:
    brightness is a factor, saturation is a matrix that preserves each pixel's luma, and contrast interpolates with the
    image's mean luma m, which saturation preserves too. So the whole is one affine map of RGB per image,
    y = b (c S x + (1 - c) m) + lighting with S x = s x + (1 - s) luma(x), here applied to normalized values.
    """
    mean_C, std_C, luma_C = (_constant(values, images_NCHW.device, images_NCHW.dtype) for values in (mean, std, _LUMA))
    b_N11, c_N11, s_N11 = (
        _to_device_of(values, images_NCHW)[:, None, None]
        for values in (planned.brightness_B, planned.contrast_B, planned.saturation_B)
    )
    gray_N1 = (images_NCHW.mean(dim=(2, 3)) * std_C + mean_C) @ luma_C[:, None]
    matrix_NCC = b_N11 * c_N11 * (s_N11 * torch.eye(3, device=images_NCHW.device) + (1 - s_N11) * luma_C)
    bias_NC = (b_N11 * (1 - c_N11))[..., 0] * gray_N1 + _to_device_of(planned.lighting_B3, images_NCHW)
    bias_NC = (matrix_NCC @ mean_C + bias_NC - mean_C) / std_C
    matrix_NCC = matrix_NCC * std_C / std_C[:, None]
    return torch.baddbmm(bias_NC[..., None], matrix_NCC, images_NCHW.flatten(2)).view_as(images_NCHW)


def gray(images_NCHW: torch.Tensor, std: Rgb) -> torch.Tensor:
    """Returns the luma of normalized images, itself normalized: [N, 1, H, W].

    With x = (p - mean) / std in each channel, luma(p) is normalized by luma(mean) and luma(std). That equals the mean
    of x weighted by luma times std.
    """
    luma_C, std_C = (_constant(values, images_NCHW.device, images_NCHW.dtype) for values in (_LUMA, std))
    weights_C = luma_C * std_C
    return torch.einsum("nchw,c->nhw", images_NCHW, weights_C / weights_C.sum())[:, None]


def erase(images_NCHW: torch.Tensor, planned: Erase, fill: Literal["mean", "noise"]) -> torch.Tensor:
    """Erases the planned boxes in place: fills them with the mean color or with standard normal noise.

    The noise is a slice of one fixed sequence; the image's seed gives the offset.
    """
    rows_E = np.flatnonzero(planned.boxes_B4[:, 2])
    if not len(rows_E):
        return images_NCHW
    device = images_NCHW.device
    index_E = _int_tensor(rows_E, device)
    erased_ECHW = images_NCHW[index_E]
    mask_E1HW = _box_mask(planned.boxes_B4[rows_E], erased_ECHW)
    if fill == "mean":
        erased_ECHW.masked_fill_(mask_E1HW, 0)
    else:
        size = erased_ECHW[0].numel()
        starts_E = _int_tensor(planned.seeds_B[rows_E] % _NOISE_STARTS, device)
        noise_ECHW = _noise(size, device).unfold(0, size, 1)[starts_E].view_as(erased_ECHW)
        erased_ECHW = torch.where(mask_E1HW, noise_ECHW, erased_ECHW)
    return images_NCHW.index_copy_(0, index_E, erased_ECHW)


def mix(
    images_NCHW: torch.Tensor, labels_N: torch.Tensor, planned: Mix, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes rows 2k and 2k + 1: mixup blends them, CutMix swaps a box between them; returns soft targets."""
    assert len(images_NCHW) % 2 == 0, "images are mixed in pairs"
    blend_N111 = _to_device_of(planned.image_lam_B, images_NCHW)[:, None, None, None]
    partners_NCHW = _partners(images_NCHW)
    mixed_NCHW = torch.lerp(partners_NCHW, images_NCHW, blend_N111)
    if planned.boxes_B4[:, 2].any():
        mixed_NCHW = torch.where(_box_mask(planned.boxes_B4, images_NCHW), partners_NCHW, mixed_NCHW)
    targets_NK = F.one_hot(labels_N, num_classes).to(images_NCHW.dtype)
    return mixed_NCHW, torch.lerp(
        _partners(targets_NK), targets_NK, _to_device_of(planned.target_lam_B, images_NCHW)[:, None]
    )


def _box_mask(boxes_B4: Ints, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Returns the mask of pixels inside the boxes: bool, [B, 1, H, W]."""
    top_B11, left_B11, height_B11, width_B11 = _int_tensor(boxes_B4, images_BCHW.device)[:, :, None, None].unbind(1)
    y_H1 = torch.arange(images_BCHW.shape[2], device=images_BCHW.device)[:, None]
    x_W = torch.arange(images_BCHW.shape[3], device=images_BCHW.device)
    rows_BH1 = (y_H1 >= top_B11) & (y_H1 < top_B11 + height_B11)
    columns_B1W = (x_W >= left_B11) & (x_W < left_B11 + width_B11)
    return (rows_BH1 & columns_B1W)[:, None]


@lru_cache(maxsize=4)
def _noise(size: int, device: torch.device) -> torch.Tensor:
    """Returns standard normal noise, equal on every device, for slices of `size` at `_NOISE_STARTS` offsets."""
    return torch.randn(_NOISE_STARTS + size, generator=torch.Generator().manual_seed(0)).to(device)


@lru_cache
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Returns the values on the device; copies them once, because each such copy blocks the host."""
    return torch.tensor(values, dtype=dtype, device=device)


def _partners(rows: torch.Tensor) -> torch.Tensor:
    """Returns rows 1, 0, 3, 2, ...: each row's mixing partner."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _to_device_of(values: NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype, non_blocking=True)


def _int_tensor(values: Ints, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
