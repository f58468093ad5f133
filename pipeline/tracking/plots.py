"""Plots for a run's artifacts and for reports."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
_NAMED_CLASSES = 40


def curve(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> "Figure":
    """Plots one line."""
    return curves({"": list(zip(x, y, strict=True))}, x_label, y_label)


def curves(lines: Mapping[str, Points], x_label: str, y_label: str) -> "Figure":
    """Plots lines by name; lines of fewer than 30 points have markers."""
    from matplotlib.figure import Figure  # imported here: a run needs no plot before its first step

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, label=name, linewidth=1.4, marker="o" if len(points) < 30 else "", markersize=3)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend(frameon=False, fontsize="small")
    return figure


def confusion_image(classes: Sequence[str], matrix_KK: NDArray[np.int64]) -> "Figure":
    """Plots a confusion matrix, normalized per true class (row)."""
    from matplotlib.figure import Figure

    fractions_KK = matrix_KK / np.maximum(1, matrix_KK.sum(axis=1, keepdims=True))
    side = 4.5 + 0.12 * min(len(classes), _NAMED_CLASSES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(fractions_KK, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= _NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    figure.colorbar(image, label="fraction of the true class")
    return figure
