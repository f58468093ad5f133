"""What an evaluation counts."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EvalResult:
    """Counts over the whole evaluation split.

    `top5_correct` counts the images whose label is among the `top5_k` best classes, `top5_k = min(5, classes)`.
    `non_finite` counts the images for which the model gave NaN or infinities: they are misses. `loss` is the mean
    cross-entropy over the others, without label smoothing; None where there are none.
    """

    total: int
    top1_correct: int
    top5_correct: int
    top5_k: int
    loss: float | None
    non_finite: int = 0

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * self.top1_correct / self.total

    @property
    def top5(self) -> float:
        """Share of the images whose label is among the `top5_k` best classes, in percent."""
        return 100 * self.top5_correct / self.total

    def better_than(self, other: "EvalResult") -> bool:
        """Finite outputs for all images; among equals more top-1 hits, then the lower loss."""
        return self._rank > other._rank

    @property
    def _rank(self) -> tuple[bool, int, float]:
        loss = math.inf if self.loss is None else self.loss
        return self.non_finite == 0, self.top1_correct, -loss


def format_accuracy(result: EvalResult) -> str:
    """`top-1 350/360 = 97.22 %, top-5 360/360 = 100.00 %`."""
    total = result.total
    parts = [
        f"top-{k} {correct}/{total} = {100 * correct / total:.2f} %"
        for k, correct in ((1, result.top1_correct), (result.top5_k, result.top5_correct))
    ]
    if result.non_finite:
        parts.append(f"NaN or infinities for {result.non_finite} of {total}")
    return ", ".join([parts[0], *parts[2:]] if result.top5_k == 1 else parts)
