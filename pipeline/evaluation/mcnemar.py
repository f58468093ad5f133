"""McNemar's test: statistical significance of an accuracy difference between two models on the same images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest


@dataclass(frozen=True)
class McNemarResult:
    """Correct predictions of a new and an old model over `total` images.

    `only_new` and `only_old` count the images that only one of the models classifies correctly. `p_value` is that of
    McNemar's exact one-sided test (McNemar 1947): the probability of an `only_new` at least this large if both models
    were equally accurate.
    """

    total: int
    new: int
    old: int
    only_new: int
    only_old: int
    p_value: float

    @property
    def gain(self) -> float:
        """Top-1 accuracy of the new model minus that of the old model, in percentage points."""
        return 100 * (self.new - self.old) / self.total


def mcnemar_test(new_N: NDArray[np.bool_], old_N: NDArray[np.bool_]) -> McNemarResult:
    """Compares two models by their correct predictions on the same images, in the same order."""
    only_new, only_old = int((new_N & ~old_N).sum()), int((old_N & ~new_N).sum())
    differ = only_new + only_old
    p_value = float(binomtest(only_new, differ, 0.5, "greater").pvalue) if differ else 1.0
    return McNemarResult(len(new_N), int(new_N.sum()), int(old_N.sum()), only_new, only_old, p_value)
