"""What is counted from probabilities and labels: accuracies, calibration, classes, confusion."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.counts import EvalResult

NO_CLASS = -1  # of an image for which the model gave NaN or infinities
_BINS = 15


@dataclass(frozen=True)
class Scores(EvalResult):
    """An evaluation's counts, and the expected calibration error over 15 bins of equal width.

    It is in [0, 1] (Guo et al. 2017, arXiv 1706.04599), of the images with finite outputs; None where there are none.
    """

    calibration_error: float | None = None


def score(probabilities_NK: NDArray[np.float32], labels_N: NDArray[np.int64]) -> Scores:
    """Counts one label for each image."""
    k = min(5, probabilities_NK.shape[1])
    best_N5 = np.argpartition(-probabilities_NK, k - 1, axis=1)[:, :k]
    best_N = best_class(probabilities_NK)
    finite_N = best_N != NO_CLASS
    correct_N = best_N == labels_N
    own_N = probabilities_NK[np.arange(len(labels_N)), labels_N].astype(np.float64)[finite_N]
    confidence_N = probabilities_NK[finite_N].max(axis=1)
    return Scores(
        total=len(labels_N),
        top1_correct=int(correct_N.sum()),
        top5_correct=int(((best_N5 == labels_N[:, None]).any(axis=1) & finite_N).sum()),
        top5_k=k,
        loss=float(-np.log(np.maximum(own_N, np.finfo(np.float32).tiny)).mean()) if len(own_N) else None,
        calibration_error=calibration_error(confidence_N, correct_N[finite_N]) if len(own_N) else None,
        non_finite=int((~finite_N).sum()),
    )


def best_class(probabilities_NK: NDArray[np.floating]) -> NDArray[np.int64]:
    """The most probable class of each image; `NO_CLASS` where a probability is NaN."""
    return np.where(np.isfinite(probabilities_NK).all(axis=1), probabilities_NK.argmax(axis=1), NO_CLASS)


def calibration_error(confidence_N: NDArray[np.float32], correct_N: NDArray[np.bool_]) -> float:
    """The mean over images of |accuracy - confidence| of the bin that each lies in."""
    bins_N = np.minimum(np.ceil(confidence_N.astype(np.float64) * _BINS).astype(int), _BINS)  # bin b is (b-1, b] / 15
    gaps = np.bincount(bins_N, weights=correct_N - confidence_N.astype(np.float64), minlength=_BINS + 1)
    return float(np.abs(gaps).sum() / len(confidence_N))


def score_sets(probabilities_NK: NDArray[np.float32], accepted: list[set[int]]) -> tuple[int, int]:
    """Images whose best class is among those accepted, and images that have any (Beyer et al. 2020, "ReaL")."""
    best_N = best_class(probabilities_NK).tolist()
    counted = [(best, labels) for best, labels in zip(best_N, accepted, strict=True) if labels]
    return sum(best in labels for best, labels in counted), len(counted)


def confusion(predicted_N: NDArray[np.int64], labels_N: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Images by true class (rows) and predicted class (columns), [K, K]; those of `NO_CLASS` are left out."""
    pairs_N = (labels_N * num_classes + predicted_N)[predicted_N != NO_CLASS]
    return np.bincount(pairs_N, minlength=num_classes**2).reshape(num_classes, num_classes)
