"""Plans random augmentations: color jitter, RandAugment, TrivialAugment, random erasing, mixup and CutMix.

All random numbers are pure functions of (seed, epoch, sample). Mixup and CutMix mix neighbors 2k and 2k + 1 in the
run's sample order; their random numbers depend on the pair's index alone. So results do not depend on the number of
workers or on gradient accumulation, as long as the micro-batch per device is even.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.config_data import Augment
from pipeline.data.philox import AUTO_AUGMENT, COLOR, ERASE, MIX, PLUGIN, Ints, draw

MAGNITUDES = 31  # bins, as in RandAugment and TrivialAugment
NUM_OPS = 14  # operators in each of DALI's two suites
_TRIES = 10

# Eigenvalues and eigenvectors (columns) of ImageNet's RGB values in [0, 1]: Krizhevsky et al. 2012, section 4.1, with
# the numbers of fb.resnet.torch.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


@dataclass(frozen=True)
class Color:
    """Factors of brightness, contrast and saturation (1: unchanged), and the PCA lighting offset of RGB in [0, 1].

    All are float32.
    """

    brightness_B: NDArray[np.float32]
    contrast_B: NDArray[np.float32]
    saturation_B: NDArray[np.float32]
    lighting_B3: NDArray[np.float32]


@dataclass(frozen=True)
class AutoAugment:
    """M operators per sample, applied in order: index in DALI's suite, magnitude bin and sign; int32."""

    ops_BM: NDArray[np.int32]
    bins_BM: NDArray[np.int32]
    signs_BM: NDArray[np.int32]


@dataclass(frozen=True)
class Erase:
    """Random erasing: boxes (top, left, height, width) in pixels, height 0 for none; seeds of the noise in them."""

    boxes_B4: Ints
    seeds_B: Ints


@dataclass(frozen=True)
class Mix:
    """Mixup and CutMix: each sample's lambda for its pixels and for its target, and the box pasted from its partner.

    Boxes are (top, left, height, width) in pixels, height 0 for none. Both samples of a pair have the same values.
    """

    image_lam_B: NDArray[np.float32]
    target_lam_B: NDArray[np.float32]
    boxes_B4: Ints


@dataclass(frozen=True)
class Augmentations:
    """The augmentations of a batch; None: disabled. `custom` has the random numbers for plugins, by plugin name."""

    color: Color | None = None
    auto_augment: AutoAugment | None = None
    erase: Erase | None = None
    mix: Mix | None = None
    custom: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def draw_counts(config: Augment) -> dict[int, int]:
    """Returns the `counts` argument of `draw` that `plan_augmentations` needs: draws per sample for each purpose."""
    counts = {
        COLOR: 2 * config.color_jitter,
        AUTO_AUGMENT: config.auto_augment_num_ops,
        ERASE: (_TRIES + 1) * bool(config.erase_prob),
        PLUGIN: len(config.custom),
    }
    return {purpose: int(count) for purpose, count in counts.items() if count}


def plan_augmentations(
    config: Augment, seed: int, positions_B: Ints, draws: dict[int, NDArray[np.float64]], side: int
) -> Augmentations:
    """Plans the augmentations of samples at positions of the run's sample order; images have `side` x `side` pixels."""
    return Augmentations(
        color=_color(config, draws[COLOR]) if COLOR in draws else None,
        auto_augment=_auto_augment(config, draws[AUTO_AUGMENT]) if AUTO_AUGMENT in draws else None,
        erase=_erase(config, draws[ERASE], side) if ERASE in draws else None,
        mix=_mix(config, seed, positions_B, side) if config.mixes_images else None,
        custom={name: draws[PLUGIN][..., i].T.astype(np.float32, order="C") for i, name in enumerate(config.custom)},
    )


def _color(config: Augment, u_4B2: NDArray[np.float64]) -> Color:
    from scipy.special import ndtri  # imported by the few runs that use it

    brightness_B, contrast_B, saturation_B = (
        1 + strength * (2 * u_4B2[i, :, 0] - 1)
        for i, strength in enumerate((config.brightness, config.contrast, config.saturation))
    )
    normal_B3 = ndtri(np.maximum(u_4B2[:3, :, 1].T, 2.0**-33))
    lighting_B3 = (config.lighting * normal_B3 * _EIGENVALUES) @ _EIGENVECTORS.T
    return Color(*(v.astype(np.float32) for v in (brightness_B, contrast_B, saturation_B, lighting_B3)))


def _auto_augment(config: Augment, u_4BM: NDArray[np.float64]) -> AutoAugment:
    random = config.auto_augment == "trivialaugment"
    bins_BM = u_4BM[1] * MAGNITUDES if random else np.full(u_4BM.shape[1:], config.randaugment_magnitude)
    ops_BM, signs_BM = u_4BM[0] * NUM_OPS, u_4BM[2] * 2
    # DALI requires contiguous rows.
    return AutoAugment(*(values_BM.astype(np.int32, order="C") for values_BM in (ops_BM, bins_BM, signs_BM)))


def _erase(config: Augment, u_4BT: NDArray[np.float64], side: int) -> Erase:
    """Random erasing as torchvision's `RandomErasing` (Zhong et al. 2017): the first of ten boxes that fits, if any."""
    chosen_E = np.flatnonzero(u_4BT[0, :, 0] < config.erase_prob)
    u_4ET = u_4BT[:, chosen_E, 1:]
    low, high = config.erase_scale
    areas_ET = side * side * (low + (high - low) * u_4ET[0])
    log_low, log_high = np.log(config.erase_ratio)
    ratios_ET = np.exp(log_low + (log_high - log_low) * u_4ET[1])
    h_ET = np.rint(np.sqrt(areas_ET * ratios_ET)).astype(np.int64)
    w_ET = np.rint(np.sqrt(areas_ET / ratios_ET)).astype(np.int64)
    fits_ET = (h_ET < side) & (w_ET < side)
    rows, try_E = np.arange(len(chosen_E)), fits_ET.argmax(axis=1)
    h_E, w_E = h_ET[rows, try_E], w_ET[rows, try_E]
    top_E = (u_4ET[2, rows, try_E] * (side - h_E + 1)).astype(np.int64)
    left_E = (u_4ET[3, rows, try_E] * (side - w_E + 1)).astype(np.int64)
    boxes_B4 = np.zeros((u_4BT.shape[1], 4), np.int64)
    boxes_B4[chosen_E] = np.stack([top_E, left_E, h_E, w_E], axis=1) * fits_ET.any(axis=1)[:, None]
    return Erase(boxes_B4, (u_4BT[1, :, 0] * 2.0**32).astype(np.int64))


def _mix(config: Augment, seed: int, positions_B: Ints, side: int) -> Mix:
    """Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019) of neighbors.

    As in CutMix, the target's lambda follows from the area of the box after clipping to the image.
    """
    from scipy.special import betaincinv

    pairs_P, pair_of_B = np.unique(positions_B // 2, return_inverse=True)
    u_4P2 = draw(seed, pairs_P >> 32, pairs_P & 0xFFFFFFFF, {MIX: 2})[MIX]
    mixed_P = u_4P2[0, :, 0] < config.mix_prob
    if config.mixup_alpha and config.cutmix_alpha:
        cut_P = u_4P2[1, :, 0] < config.mix_switch_prob
    else:
        cut_P = np.full(len(pairs_P), bool(config.cutmix_alpha))
    alpha_P = np.where(cut_P, config.cutmix_alpha or 1.0, config.mixup_alpha or 1.0)
    lam_P = betaincinv(alpha_P, alpha_P, u_4P2[2, :, 0])
    cut_side_P = side * np.sqrt(1 - lam_P)
    y_P, x_P = (u_4P2[i, :, 1] * side for i in (0, 1))
    top_P, bottom_P = (np.clip(np.rint(y_P + s * cut_side_P / 2), 0, side) for s in (-1, 1))
    left_P, right_P = (np.clip(np.rint(x_P + s * cut_side_P / 2), 0, side) for s in (-1, 1))
    boxes_P4 = np.stack([top_P, left_P, bottom_P - top_P, right_P - left_P], axis=1).astype(np.int64)
    boxes_P4 *= (cut_P & mixed_P)[:, None]
    image_lam_P = np.where(mixed_P & ~cut_P, lam_P, 1.0)
    target_lam_P = image_lam_P - boxes_P4[:, 2] * boxes_P4[:, 3] / (side * side)
    return Mix(
        image_lam_P.astype(np.float32)[pair_of_B], target_lam_P.astype(np.float32)[pair_of_B], boxes_P4[pair_of_B]
    )
