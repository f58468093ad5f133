"""Augmentations of whole batches on their device: color, erasing, mixing; all that is random about them is planned.

A fixed number of kernels for a batch of any size, and nothing that makes the host wait for the device.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.config import Rgb
from pipeline.data.augment import Augmentations, Color, Erase, Mix
from pipeline.data.philox import Ints
from pipeline.extension_points import AUGMENTATIONS

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision
_NOISE_STARTS = 2**22  # places in the noise at which an image's part of it may begin


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
    """Augments normalized images; returns them with their targets.

    Targets are the labels (int64, [N]), or class shares (fp32, [N, classes]) where images are mixed.
    """
    if planned.color is not None:
        images_NCHW = color(images_NCHW, planned.color, mean, std)
    if planned.erase is not None:
        images_NCHW = erase(images_NCHW, planned.erase, erase_fill)
    for name, random_B4 in planned.custom.items():
        images_NCHW = AUGMENTATIONS[name](images_NCHW, _to(random_B4, images_NCHW))
    if planned.mix is not None:
        return mix(images_NCHW, labels_N, planned.mix, num_classes)
    return images_NCHW, labels_N


def color(images_NCHW: torch.Tensor, planned: Color, mean: Rgb, std: Rgb) -> torch.Tensor:
    """Jitters brightness, contrast and saturation, and adds lighting, as fb.resnet.torch does.

    There the three come in random order on numbers that are not clamped. Then the order makes no difference: brightness
    is a factor, saturation a matrix that keeps each pixel's luma, and contrast moves towards the image's mean luma,
    which saturation keeps too. So the whole is one affine map of RGB for each image,
    y = b (c S x + (1 - c) m) + lighting with S x = s x + (1 - s) luma(x), here applied to normalized values.
    """
    mean_C, std_C, luma_C = (_constant(values, images_NCHW.device, images_NCHW.dtype) for values in (mean, std, _LUMA))
    b_N11, c_N11, s_N11 = (
        _to(values, images_NCHW)[:, None, None]
        for values in (planned.brightness_B, planned.contrast_B, planned.saturation_B)
    )
    gray_N1 = (images_NCHW.mean(dim=(2, 3)) * std_C + mean_C) @ luma_C[:, None]
    matrix_NCC = b_N11 * c_N11 * (s_N11 * torch.eye(3, device=images_NCHW.device) + (1 - s_N11) * luma_C)
    added_NC = (b_N11 * (1 - c_N11))[..., 0] * gray_N1 + _to(planned.lighting_B3, images_NCHW)
    added_NC = (matrix_NCC @ mean_C + added_NC - mean_C) / std_C
    matrix_NCC = matrix_NCC * std_C / std_C[:, None]
    return torch.baddbmm(added_NC[..., None], matrix_NCC, images_NCHW.flatten(2)).view_as(images_NCHW)


def gray(images_NCHW: torch.Tensor, std: Rgb) -> torch.Tensor:
    """The luma of normalized images, normalized as their channels are: [N, 1, H, W].

    With x = (p - mean) / std in each channel, luma(p) is normalized by luma(mean) and luma(std), which leaves the mean
    of x weighted by luma times std.
    """
    luma_C, std_C = (_constant(values, images_NCHW.device, images_NCHW.dtype) for values in (_LUMA, std))
    weights_C = luma_C * std_C
    return torch.einsum("nchw,c->nhw", images_NCHW, weights_C / weights_C.sum())[:, None]


def erase(images_NCHW: torch.Tensor, planned: Erase, fill: Literal["mean", "noise"]) -> torch.Tensor:
    """Fills the planned boxes, in place, with the mean color or with normal noise of the images' own deviation.

    The noise is one fixed sequence, of which each image takes the part that begins where its seed says.
    """
    rows_E = np.flatnonzero(planned.boxes_B4[:, 2])
    if not len(rows_E):
        return images_NCHW
    device = images_NCHW.device
    index_E = _integers(rows_E, device)
    erased_ECHW = images_NCHW[index_E]
    inside_E1HW = _inside(planned.boxes_B4[rows_E], erased_ECHW)
    if fill == "mean":
        erased_ECHW.masked_fill_(inside_E1HW, 0)
    else:
        size = erased_ECHW[0].numel()
        starts_E = _integers(planned.seeds_B[rows_E] % _NOISE_STARTS, device)
        noise_ECHW = _noise(size, device).unfold(0, size, 1)[starts_E].view_as(erased_ECHW)
        erased_ECHW = torch.where(inside_E1HW, noise_ECHW, erased_ECHW)
    return images_NCHW.index_copy_(0, index_E, erased_ECHW)


def mix(
    images_NCHW: torch.Tensor, labels_N: torch.Tensor, planned: Mix, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blends rows 2k and 2k + 1 with each other, or pastes a box of each into the other; targets are class shares."""
    assert len(images_NCHW) % 2 == 0, "images are mixed in pairs"
    blend_N111 = _to(planned.blend_B, images_NCHW)[:, None, None, None]
    partners_NCHW = _partners(images_NCHW)
    mixed_NCHW = torch.lerp(partners_NCHW, images_NCHW, blend_N111)
    if planned.boxes_B4[:, 2].any():
        mixed_NCHW = torch.where(_inside(planned.boxes_B4, images_NCHW), partners_NCHW, mixed_NCHW)
    shares_NK = F.one_hot(labels_N, num_classes).to(images_NCHW.dtype)
    return mixed_NCHW, torch.lerp(_partners(shares_NK), shares_NK, _to(planned.weight_B, images_NCHW)[:, None])


def _inside(boxes_B4: Ints, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Which pixels lie in the boxes: bool [B, 1, H, W]."""
    top_B11, left_B11, height_B11, width_B11 = _integers(boxes_B4, images_BCHW.device)[:, :, None, None].unbind(1)
    y_H1 = torch.arange(images_BCHW.shape[2], device=images_BCHW.device)[:, None]
    x_W = torch.arange(images_BCHW.shape[3], device=images_BCHW.device)
    rows_BH1 = (y_H1 >= top_B11) & (y_H1 < top_B11 + height_B11)
    columns_B1W = (x_W >= left_B11) & (x_W < left_B11 + width_B11)
    return (rows_BH1 & columns_B1W)[:, None]


@lru_cache(maxsize=4)
def _noise(size: int, device: torch.device) -> torch.Tensor:
    """Normal numbers, the same on every device, of which parts of `size` may begin at `_NOISE_STARTS` places."""
    return torch.randn(_NOISE_STARTS + size, generator=torch.Generator().manual_seed(0)).to(device)


@lru_cache
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The values on the device; copied there once, since each such copy makes the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)


def _partners(rows: torch.Tensor) -> torch.Tensor:
    """Rows 1, 0, 3, 2, ..."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _to(values: NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype, non_blocking=True)


def _integers(values: Ints, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
