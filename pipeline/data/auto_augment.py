"""RandAugment and TrivialAugment by DALI's own operators, chosen by the plan and not by DALI's random numbers."""

from typing import Any

from nvidia.dali.auto_aug.core import signed_bin
from nvidia.dali.auto_aug.core._select import select
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite

from pipeline.data.augment import MAGNITUDES

_GRAY = 128  # fills what geometric operators leave empty, as is DALI's default


def suite(kind: str) -> list[Any]:
    """DALI's operators of a kind, `randaugment` or `trivialaugment`.

    Translations are shares of the image's side: what DALI's defaults of 100 and 32 pixels are of 224.
    """
    if kind == "randaugment":
        return get_rand_augment_suite(use_shape=True, max_translate_rel=100 / 224)
    return get_trivial_augment_wide_suite(use_shape=True, max_translate_rel=32 / 224)


def augmented(images: Any, ops: Any, bins: Any, signs: Any, shape: Any, kind: str, stages: int) -> Any:
    """Applies `stages` planned operators one after another, inside a pipeline with conditionals.

    `ops`, `bins` and `signs` are int32 vectors of `stages` numbers for each image; `shape` is its height and width.
    """
    for stage in range(stages):
        images = select(
            suite(kind),
            ops[stage],
            data=images,
            magnitude_bin=signed_bin(bins[stage], random_sign=signs[stage]),
            num_magnitude_bins=MAGNITUDES,
            shape=shape,
            fill_value=_GRAY,
        )
    return images
