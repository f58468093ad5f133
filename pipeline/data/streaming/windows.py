"""An epoch's windows of shards: which shards are read at which offsets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from pipeline.data.philox import SHUFFLE_SHARDS, Ints
from pipeline.data.plan import permutation


@dataclass(frozen=True, eq=False)
class Windows:
    """An epoch's shards in random order, and their division into windows.

    Attributes:
        shards_S: the shards in order; window w has those from w * size to (w + 1) * size.
        size: number of shards per window; the last window may have fewer.
        first_offsets_W1: offset in the epoch of each window's first sample, and the number of samples, int64.
    """

    shards_S: Ints
    size: int
    first_offsets_W1: Ints

    def __len__(self) -> int:
        return len(self.first_offsets_W1) - 1

    def shards(self, window: int) -> Ints:
        """Returns the shards of a window, in order."""
        return self.shards_S[window * self.size : (window + 1) * self.size]

    def at(self, offsets_B: Ints) -> Ints:
        """Returns the windows at offsets in the epoch."""
        return self.first_offsets_W1.searchsorted(offsets_B, "right") - 1


@dataclass(frozen=True, eq=False)
class WindowedOrder:
    """Each epoch shuffles the shards, groups them into windows, and shuffles the samples within each window."""

    seed: int
    first_rows_S1: Ints = field(repr=False)
    window: int

    def windows(self, epoch: int) -> Windows:
        """Returns the windows of an epoch."""
        return self._cached_windows(epoch)

    @cached_property
    def _cached_windows(self) -> Callable[[int], Windows]:
        return lru_cache(2)(self._windows)

    def _windows(self, epoch: int) -> Windows:
        num_shards = len(self.first_rows_S1) - 1
        shards_S = permutation(self.seed, epoch, num_shards, purpose=SHUFFLE_SHARDS)
        first_offsets_S1 = np.append(0, np.cumsum(np.diff(self.first_rows_S1)[shards_S]))
        first_offsets_W1 = first_offsets_S1[[*range(0, num_shards, self.window), num_shards]]
        return Windows(shards_S, self.window, first_offsets_W1)
