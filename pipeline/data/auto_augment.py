"""RandAugment and TrivialAugment with DALI's operators; the plan, not DALI's RNG, chooses operators and magnitudes."""

from typing import Any

from nvidia.dali.auto_aug.core import signed_bin
from nvidia.dali.auto_aug.core._select import select
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite

from pipeline.data.augment import MAGNITUDES

_GRAY = 128  # fill value of geometric operators; DALI's default


def suite(kind: str) -> list[Any]:
    """Returns DALI's operators for `randaugment` or `trivialaugment`.

    Translations are relative to the image's side: DALI's defaults of 100 and 32 pixels, divided by 224.
    """
    if kind == "randaugment":
        return get_rand_augment_suite(use_shape=True, max_translate_rel=100 / 224)
    return get_trivial_augment_wide_suite(use_shape=True, max_translate_rel=32 / 224)


def apply_auto_augment(images: Any, ops: Any, bins: Any, signs: Any, shape: Any, kind: str, num_ops: int) -> Any:
    """Applies `num_ops` planned operators in order, inside a DALI pipeline with conditionals.

    `ops`, `bins` and `signs` are int32 vectors of length `num_ops` per image; `shape` is the image's height and width.
    """
    for i in range(num_ops):
        images = select(
            suite(kind),
            ops[i],
            data=images,
            magnitude_bin=signed_bin(bins[i], random_sign=signs[i]),
            num_magnitude_bins=MAGNITUDES,
            shape=shape,
            fill_value=_GRAY,
        )
    return images
