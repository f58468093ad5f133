"""Two models on the same images: is one better, or is it chance?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest


@dataclass(frozen=True)
class McNemarResult:
    """Counts over `total` images: hits of the new and the old model, and those that only one of them has.

    `p_value` is that of McNemar's exact test, one-sided: the chance of the new one having as large a share of the
    images that only one of them gets right, or a larger one, if both were equally good (McNemar 1947).
    """

    total: int
    new: int
    old: int
    only_new: int
    only_old: int
    p_value: float

    @property
    def gain(self) -> float:
        """Top-1 of the new model less that of the old one, in percentage points."""
        return 100 * (self.new - self.old) / self.total


def mcnemar_test(new_N: NDArray[np.bool_], old_N: NDArray[np.bool_]) -> McNemarResult:
    """Compares which images are hit, in the same order."""
    only_new, only_old = int((new_N & ~old_N).sum()), int((old_N & ~new_N).sum())
    differ = only_new + only_old
    p_value = float(binomtest(only_new, differ, 0.5, "greater").pvalue) if differ else 1.0
    return McNemarResult(len(new_N), int(new_N.sum()), int(old_N.sum()), only_new, only_old, p_value)
