"""Metrics from probabilities and labels: top-1 and top-5 accuracy, loss, calibration error, confusion matrix."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.counts import EvalResult

NO_CLASS = -1  # predicted class of an image with NaN or infinite outputs
_BINS = 15


@dataclass(frozen=True)
class Scores(EvalResult):
    """Counts of an evaluation, and the expected calibration error (ECE) over 15 bins of equal width.

    The ECE is in [0, 1] (Guo et al. 2017, arXiv 1706.04599) and covers the images with finite outputs; None if there
    are none.
    """

    calibration_error: float | None = None


def score(probabilities_NK: NDArray[np.float32], labels_N: NDArray[np.int64]) -> Scores:
    """Computes the scores of probabilities [N, K] for one label per image."""
    k = min(5, probabilities_NK.shape[1])
    best_N5 = np.argpartition(-probabilities_NK, k - 1, axis=1)[:, :k]
    best_N = best_class(probabilities_NK)
    finite_N = best_N != NO_CLASS
    correct_N = best_N == labels_N
    of_label_N = probabilities_NK[np.arange(len(labels_N)), labels_N].astype(np.float64)[finite_N]
    confidence_N = probabilities_NK[finite_N].max(axis=1)
    return Scores(
        total=len(labels_N),
        top1_correct=int(correct_N.sum()),
        top5_correct=int(((best_N5 == labels_N[:, None]).any(axis=1) & finite_N).sum()),
        top5_k=k,
        loss=float(-np.log(np.maximum(of_label_N, np.finfo(np.float32).tiny)).mean()) if len(of_label_N) else None,
        calibration_error=calibration_error(confidence_N, correct_N[finite_N]) if len(of_label_N) else None,
        non_finite=int((~finite_N).sum()),
    )


def best_class(probabilities_NK: NDArray[np.floating]) -> NDArray[np.int64]:
    """Returns the most probable class of each image; `NO_CLASS` if a probability is NaN."""
    return np.where(np.isfinite(probabilities_NK).all(axis=1), probabilities_NK.argmax(axis=1), NO_CLASS)


def calibration_error(confidence_N: NDArray[np.float32], correct_N: NDArray[np.bool_]) -> float:
    """Returns the expected calibration error: the mean over images of |accuracy - confidence| of their bin."""
    bins_N = np.minimum(np.ceil(confidence_N.astype(np.float64) * _BINS).astype(int), _BINS)  # bin b is (b-1, b] / 15
    gaps = np.bincount(bins_N, weights=correct_N - confidence_N.astype(np.float64), minlength=_BINS + 1)
    return float(np.abs(gaps).sum() / len(confidence_N))


def score_sets(probabilities_NK: NDArray[np.float32], accepted: list[set[int]]) -> tuple[int, int]:
    """Counts the images whose best class is in `accepted`, and the images with a label (Beyer et al. 2020, "ReaL")."""
    best_N = best_class(probabilities_NK).tolist()
    counted = [(best, labels) for best, labels in zip(best_N, accepted, strict=True) if labels]
    return sum(best in labels for best, labels in counted), len(counted)


def confusion(predicted_N: NDArray[np.int64], labels_N: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Returns the confusion matrix [K, K]: true class (rows) by predicted class (columns). Excludes `NO_CLASS`."""
    pairs_N = (labels_N * num_classes + predicted_N)[predicted_N != NO_CLASS]
    return np.bincount(pairs_N, minlength=num_classes**2).reshape(num_classes, num_classes)
