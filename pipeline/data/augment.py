"""What is random about training pictures besides crop and flip: pure arithmetic on (seed, epoch, sample).

Mixing is of pairs, the neighbours 2k and 2k + 1 in the run's sample order, and follows from the pair's number: so it is
the same whatever the number of workers and the split of the batch, as long as device batches are even.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtri

from pipeline.config import Augment
from pipeline.data.philox import AUTO, COLOUR, ERASE, MIX, Ints, draw

MAGNITUDES = 31  # bins, as in RandAugment and TrivialAugment
NUM_OPS = 14  # of each of DALI's suites
_TRIES = 10

# Eigenvalues and eigenvectors (columns) of ImageNet's RGB values in [0, 1]: Krizhevsky et al. 2012, section 4.1, with
# the numbers of fb.resnet.torch.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


@dataclass(frozen=True)
class Colour:
    """Factors of brightness, contrast and saturation (1: as it is), and what is added to RGB in [0, 1]; float32."""

    brightness_B: NDArray[np.float32]
    contrast_B: NDArray[np.float32]
    saturation_B: NDArray[np.float32]
    lighting_B3: NDArray[np.float32]


@dataclass(frozen=True)
class Auto:
    """Which of the suite's operators come one after another, with the bins and signs of their magnitudes; int32."""

    ops_BM: NDArray[np.int32]
    bins_BM: NDArray[np.int32]
    signs_BM: NDArray[np.int32]


@dataclass(frozen=True)
class Erase:
    """Boxes (top, left, height, width) in pixels, of height 0 where nothing is erased; seeds of the noise in them."""

    boxes_B4: Ints
    seeds_B: Ints


@dataclass(frozen=True)
class Mix:
    """Each sample's weight in its pixels (`blend_B`) and in its target (`weight_B`), and the box its partner pastes.

    Boxes are (top, left, height, width) in pixels, of height 0 where nothing is pasted. Both of a pair have the same.
    """

    blend_B: NDArray[np.float32]
    weight_B: NDArray[np.float32]
    boxes_B4: Ints


@dataclass(frozen=True)
class Augmentations:
    """The augmentations of a batch; None where one is off."""

    colour: Colour | None = None
    auto: Auto | None = None
    erase: Erase | None = None
    mix: Mix | None = None


def augmentations(
    config: Augment, seed: int, positions_B: Ints, epochs_B: Ints, ids_B: Ints, side: int
) -> Augmentations:
    """Plans the augmentations of samples at positions of the run's order, as pictures of `side` pixels."""
    sample = (seed, epochs_B, ids_B)
    has_colour = config.brightness or config.contrast or config.saturation or config.lighting
    return Augmentations(
        colour=_colour(config, *sample) if has_colour else None,
        auto=_auto(config, *sample) if config.auto != "none" else None,
        erase=_erase(config, *sample, side) if config.erase else None,
        mix=_mix(config, seed, positions_B, side) if config.mixes else None,
    )


def _colour(config: Augment, seed: int, epochs_B: Ints, ids_B: Ints) -> Colour:
    u_4B2 = draw(seed, epochs_B, ids_B, 2, COLOUR)
    brightness_B, contrast_B, saturation_B = (
        1 + strength * (2 * u_4B2[i, :, 0] - 1)
        for i, strength in enumerate((config.brightness, config.contrast, config.saturation))
    )
    normal_B3 = ndtri(np.maximum(u_4B2[:3, :, 1].T, 2.0**-33))
    lighting_B3 = (config.lighting * normal_B3 * _EIGENVALUES) @ _EIGENVECTORS.T
    return Colour(*(v.astype(np.float32) for v in (brightness_B, contrast_B, saturation_B, lighting_B3)))


def _auto(config: Augment, seed: int, epochs_B: Ints, ids_B: Ints) -> Auto:
    u_4BM = draw(seed, epochs_B, ids_B, config.auto_stages, AUTO)
    random = config.auto == "trivialaugment"
    bins_BM = u_4BM[1] * MAGNITUDES if random else np.full(u_4BM.shape[1:], config.auto_magnitude)
    ops_BM, signs_BM = u_4BM[0] * NUM_OPS, u_4BM[2] * 2
    return Auto(*(values_BM.astype(np.int32) for values_BM in (ops_BM, bins_BM, signs_BM)))


def _erase(config: Augment, seed: int, epochs_B: Ints, ids_B: Ints, side: int) -> Erase:
    """torchvision's `RandomErasing` (Zhong et al. 2017): the first of ten boxes that fits, if any."""
    u_4BT = draw(seed, epochs_B, ids_B, _TRIES + 1, ERASE)
    low, high = config.erase_area
    areas_BT = side * side * (low + (high - low) * u_4BT[0, :, :_TRIES])
    log_low, log_high = np.log(config.erase_ratio)
    ratios_BT = np.exp(log_low + (log_high - log_low) * u_4BT[1, :, :_TRIES])
    h_BT = np.rint(np.sqrt(areas_BT * ratios_BT)).astype(np.int64)
    w_BT = np.rint(np.sqrt(areas_BT / ratios_BT)).astype(np.int64)
    fits_BT = (h_BT < side) & (w_BT < side)
    batch, try_B = np.arange(len(ids_B)), fits_BT.argmax(axis=1)
    h_B, w_B = h_BT[batch, try_B], w_BT[batch, try_B]
    top_B = (u_4BT[2, batch, try_B] * (side - h_B + 1)).astype(np.int64)
    left_B = (u_4BT[3, batch, try_B] * (side - w_B + 1)).astype(np.int64)
    erased_B = (u_4BT[0, :, _TRIES] < config.erase) & fits_BT.any(axis=1)
    boxes_B4 = np.stack([top_B, left_B, h_B, w_B], axis=1) * erased_B[:, None]
    return Erase(boxes_B4, (u_4BT[1, :, _TRIES] * 2.0**32).astype(np.int64))


def _mix(config: Augment, seed: int, positions_B: Ints, side: int) -> Mix:
    """Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019) of neighbours; a box counts as it lies in the picture."""
    pairs_B = positions_B // 2
    u_4B2 = draw(seed, pairs_B >> 32, pairs_B & 0xFFFFFFFF, 2, MIX)
    mixed_B = u_4B2[0, :, 0] < config.mix_probability
    if config.mixup and config.cutmix:
        cut_B = u_4B2[1, :, 0] < config.cutmix_share
    else:
        cut_B = np.full(len(pairs_B), bool(config.cutmix))
    alpha_B = np.where(cut_B, config.cutmix or 1.0, config.mixup or 1.0)
    lam_B = betaincinv(alpha_B, alpha_B, u_4B2[2, :, 0])
    cut_side_B = side * np.sqrt(1 - lam_B)
    y_B, x_B = (u_4B2[i, :, 1] * side for i in (0, 1))
    top_B, bottom_B = (np.clip(np.rint(y_B + s * cut_side_B / 2), 0, side) for s in (-1, 1))
    left_B, right_B = (np.clip(np.rint(x_B + s * cut_side_B / 2), 0, side) for s in (-1, 1))
    boxes_B4 = np.stack([top_B, left_B, bottom_B - top_B, right_B - left_B], axis=1).astype(np.int64)
    boxes_B4 *= (cut_B & mixed_B)[:, None]
    blend_B = np.where(mixed_B & ~cut_B, lam_B, 1.0)
    weight_B = blend_B - boxes_B4[:, 2] * boxes_B4[:, 3] / (side * side)
    return Mix(blend_B.astype(np.float32), weight_B.astype(np.float32), boxes_B4)
