"""Pictures for a run's artifacts."""

from collections.abc import Sequence

from matplotlib.figure import Figure


def curve(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> Figure:
    """One line over one axis."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, y)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure
