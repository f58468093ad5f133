"""How well the windowed shuffle mixes classes: shards that are ordered by class give windows of few classes."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.index import DatasetIndex
from pipeline.data.order import WindowedOrder

_WINDOWS = 8  # measured
_POOR = 0.5  # of the expected number of classes


@dataclass(frozen=True)
class WindowClasses:
    """The mean number of different classes per window of shards.

    Attributes:
        window: Shards per window.
        found: In the windows of an epoch, of which a few are measured.
        expected: In as many samples that are drawn at random from the split.
    """

    window: int
    found: float
    expected: float

    @property
    def is_poor(self) -> bool:
        """Whether windows have less than half the classes that they would have if samples were shuffled."""
        return self.found < _POOR * self.expected

    def __str__(self) -> str:
        return (
            f"windows of {self.window} shards have {self.found:.1f} classes on average, and would have "
            f"{self.expected:.1f} if samples were shuffled"
        )


def window_classes(index: DatasetIndex, window: int) -> WindowClasses:
    """Measures windows of `window` shards of a split in shards; reads the labels of a few windows only.

    Of m samples drawn from N without replacement, class k with n_k samples is missing with probability
    C(N - n_k, m) / C(N, m), which is close to (1 - m / N)^n_k.
    """
    windows = WindowedOrder(0, index.first_rows_S1, window).windows(0)
    counts_K, total = np.array(index.summary.counts_K), len(index)
    found, expected = [], []
    for number in range(min(_WINDOWS, len(windows))):
        rows = [slice(*index.first_rows_S1[shard : shard + 2]) for shard in windows.shards(number)]
        labels = np.concatenate([index.labels_N[shard_rows] for shard_rows in rows])
        found.append(len(np.unique(labels)))
        expected.append(np.sum(1 - (1 - len(labels) / total) ** counts_K))
    return WindowClasses(window, float(np.mean(found)), float(np.mean(expected)))


def shuffle_warning(index: DatasetIndex, window: int) -> str | None:
    """Returns a warning if the windowed shuffle mixes few classes; None if it does not matter."""
    measured = window_classes(index, window)
    if not measured.is_poor:
        return None
    return (
        f"data.shuffle=windowed: {measured}: the shards are ordered by class, so batches have few classes and accuracy "
        f"suffers. Use a larger data.window, data.shuffle=full, or shards that `densenet data prepare` shuffles"
    )
