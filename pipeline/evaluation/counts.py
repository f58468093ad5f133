"""Counts of an evaluation: top-1 and top-5 accuracy, loss."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EvalResult:
    """Counts over the whole evaluation split.

    Attributes:
        total: Number of images.
        top1_correct: Images whose label is the most probable class.
        top5_correct: Images whose label is among the `top5_k` most probable classes.
        top5_k: min(5, number of classes).
        loss: Mean cross-entropy over the images with finite outputs, without label smoothing; None if there are none.
        non_finite: Images with NaN or infinite outputs; they count as incorrect.
    """

    total: int
    top1_correct: int
    top5_correct: int
    top5_k: int
    loss: float | None
    non_finite: int = 0

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.top1_correct / self.total

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent (top-`top5_k` for fewer than five classes)."""
        return 100 * self.top5_correct / self.total

    def better_than(self, other: "EvalResult") -> bool:
        """Compares evaluations: finite outputs for all images first, then top-1 accuracy, then the lower loss."""
        return self._rank > other._rank

    @property
    def _rank(self) -> tuple[bool, int, float]:
        loss = math.inf if self.loss is None else self.loss
        return self.non_finite == 0, self.top1_correct, -loss


def format_accuracy(result: EvalResult) -> str:
    """Formats accuracies as `top-1 350/360 = 97.22 %, top-5 360/360 = 100.00 %`."""
    total = result.total
    parts = [
        f"top-{k} {correct}/{total} = {100 * correct / total:.2f} %"
        for k, correct in ((1, result.top1_correct), (result.top5_k, result.top5_correct))
    ]
    if result.non_finite:
        parts.append(f"NaN or infinities for {result.non_finite} of {total}")
    return ", ".join([parts[0], *parts[2:]] if result.top5_k == 1 else parts)
