"""Augmentations of whole batches on their device: colour, erasing, mixing; all that is random about them is planned."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.config import Rgb
from pipeline.data.augment import Augmentations, Colour, Erase, Mix
from pipeline.seams import AUGMENTATIONS

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision


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
    """Augments normalised pictures; returns them with their targets.

    Targets are the labels (int64, [N]), or class shares (fp32, [N, classes]) where pictures are mixed.
    """
    if planned.colour is not None:
        images_NCHW = colour(images_NCHW, planned.colour, mean, std)
    if planned.erase is not None:
        images_NCHW = erase(images_NCHW, planned.erase, erase_fill)
    for name, random_B4 in planned.also.items():
        images_NCHW = AUGMENTATIONS[name](images_NCHW, _to(random_B4, images_NCHW))
    if planned.mix is not None:
        return mix(images_NCHW, labels_N, planned.mix, num_classes)
    return images_NCHW, labels_N


def colour(images_NCHW: torch.Tensor, planned: Colour, mean: Rgb, std: Rgb) -> torch.Tensor:
    """Jitters brightness, contrast and saturation, and adds lighting, as fb.resnet.torch does.

    There the three come in random order on numbers that are not clamped. Then the order makes no difference: brightness
    is a factor, saturation a matrix that keeps each pixel's luma, and contrast moves towards the picture's mean luma,
    which saturation keeps too. So the whole is one affine map of RGB for each picture,
    y = b (c S x + (1 - c) m) + lighting with S x = s x + (1 - s) luma(x), here applied to normalised values.
    """
    mean_C, std_C, luma_C = (images_NCHW.new_tensor(values) for values in (mean, std, _LUMA))
    b_N11, c_N11, s_N11 = (
        _to(values, images_NCHW)[:, None, None]
        for values in (planned.brightness_B, planned.contrast_B, planned.saturation_B)
    )
    grey_N1 = (images_NCHW.mean(dim=(2, 3)) * std_C + mean_C) @ luma_C[:, None]
    matrix_NCC = b_N11 * c_N11 * (s_N11 * torch.eye(3, device=images_NCHW.device) + (1 - s_N11) * luma_C)
    added_NC = (b_N11 * (1 - c_N11))[..., 0] * grey_N1 + _to(planned.lighting_B3, images_NCHW)
    added_NC = (matrix_NCC @ mean_C + added_NC - mean_C) / std_C
    matrix_NCC = matrix_NCC * std_C / std_C[:, None]
    return torch.baddbmm(added_NC[..., None], matrix_NCC, images_NCHW.flatten(2)).view_as(images_NCHW)


def grey(images_NCHW: torch.Tensor, std: Rgb) -> torch.Tensor:
    """The luma of normalised pictures, normalised as their channels are: [N, 1, H, W].

    With x = (p - mean) / std in each channel, luma(p) is normalised by luma(mean) and luma(std), which leaves the mean
    of x weighted by luma times std.
    """
    weights_C = images_NCHW.new_tensor(_LUMA) * images_NCHW.new_tensor(std)
    return torch.einsum("nchw,c->nhw", images_NCHW, weights_C / weights_C.sum())[:, None]


def erase(images_NCHW: torch.Tensor, planned: Erase, fill: Literal["mean", "noise"]) -> torch.Tensor:
    """Fills the planned boxes, in place, with the mean colour or with normal noise of the pictures' own deviation."""
    for image_CHW, (top, left, height, width), seed in zip(
        images_NCHW, planned.boxes_B4.tolist(), planned.seeds_B.tolist(), strict=True
    ):
        if not height:
            continue
        box_CHW = image_CHW[:, top : top + height, left : left + width]
        if fill == "mean":
            box_CHW.zero_()
        else:
            box_CHW.normal_(generator=torch.Generator(images_NCHW.device).manual_seed(seed))
    return images_NCHW


def mix(
    images_NCHW: torch.Tensor, labels_N: torch.Tensor, planned: Mix, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blends rows 2k and 2k + 1 with each other, or pastes a box of each into the other; targets are class shares."""
    assert len(images_NCHW) % 2 == 0, "pictures are mixed in pairs"
    blend_N111 = _to(planned.blend_B, images_NCHW)[:, None, None, None]
    mixed_NCHW = torch.lerp(_partners(images_NCHW), images_NCHW, blend_N111)
    for i, (top, left, height, width) in enumerate(planned.boxes_B4.tolist()):
        if height:
            box = (slice(None), slice(top, top + height), slice(left, left + width))
            mixed_NCHW[i][box] = images_NCHW[i ^ 1][box]
    shares_NK = F.one_hot(labels_N, num_classes).to(images_NCHW.dtype)
    return mixed_NCHW, torch.lerp(_partners(shares_NK), shares_NK, _to(planned.weight_B, images_NCHW)[:, None])


def _partners(rows: torch.Tensor) -> torch.Tensor:
    """Rows 1, 0, 3, 2, ..."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _to(values: NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype, non_blocking=True)
