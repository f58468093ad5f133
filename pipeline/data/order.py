"""The order of an epoch's samples, computed at any position: there is no table of samples to create, store or seek.

An epoch's permutation is a generalized Feistel network (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
A position below N is a pair (l, r) of Z_a x Z_b with a, b near sqrt(N). Rounds alternately add F(r) to l and G(l) to r,
modulo a and b, and each is a bijection whatever F and G are; positions that leave the range, fewer than one in b, pass
again. Here F and G are tables of sqrt(N) random numbers (Philox of seed, epoch, window and purpose), new in each round:
two NumPy operations per round; for an epoch of 10**8 samples 3 MB, created in a few milliseconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from pipeline.data.philox import SHUFFLE, SHUFFLE_SHARDS, Ints, philox

ORDER_VERSION = 2  # of all orders here: with another one no run resumes, and no preparation of shards continues

# Patarin's test (2001, "Generic attacks on Feistel schemes") finds 6 rounds in a hundred epochs, 8 in more than N.
ROUNDS = 8
# Up to this size samples are sorted by random keys: 0.2 ms more at most, and all permutations are equally likely.
SORTED = 1 << 12

Permutation = Callable[[Ints], Ints]
Words = Callable[[int], NDArray[np.uint64]]


@lru_cache(8)
def permutation(seed: int, epoch: int, size: int, window: int = 0, purpose: int = SHUFFLE) -> Permutation:
    """Returns a random permutation of range(size), as a function of arrays of positions."""
    words = partial(_words, seed, epoch, window, purpose)
    return sorted_permutation(size, words) if size <= SORTED else FeistelPermutation(size, words)


def _words(seed: int, epoch: int, window: int, purpose: int, count: int) -> NDArray[np.uint64]:
    """Returns random words below 2**32, shape [count], uint64."""
    key = (np.array(value, np.uint64) for value in (epoch, window, purpose))
    return philox((np.arange(-(-count // 4), dtype=np.uint64), *key), seed).ravel()[:count]


def sorted_permutation(size: int, words: Words) -> Permutation:
    """Returns a permutation that sorts 64-bit random keys; `words(n)` returns n random words below 2**32."""
    high_N, low_N = words(2 * size).reshape(2, size)
    return np.argsort(high_N << np.uint64(32) | low_N, kind="stable").take


class FeistelPermutation:
    """A permutation of range(size) by a Feistel network; `words(n)` returns n random words below 2**32.

    `a` is even: with a and b odd, each round would be an even permutation, and so would their product.
    """

    def __init__(self, size: int, words: Words, rounds: int = ROUNDS) -> None:
        self.size = size
        self._a = a = 2 * max(1, (isqrt(size) + 1) // 2)
        self._b = b = -(-size // a)
        words_PX = words(rounds // 2 * (a + b)).reshape(rounds // 2, a + b)
        # Before pair i of rounds l < (i + 1) a and r < (i + 1) b: tables repeated as often spare a remainder per round.
        self._tables = [
            (np.tile(_scaled(w_X[:b], a), i + 1), np.tile(_scaled(w_X[b:], b), i + 2)) for i, w_X in enumerate(words_PX)
        ]

    def __call__(self, positions_B: Ints) -> Ints:
        """Returns the elements at positions in [0, size), int64."""
        ids_B = self._encipher(positions_B)
        while (outside_B := ids_B >= self.size).any():  # cycle walking
            ids_B[outside_B] = self._encipher(ids_B[outside_B])
        return ids_B

    def _encipher(self, x_B: Ints) -> Ints:
        l_B, r_B = np.divmod(x_B, self._b)
        for f_X, g_X in self._tables:
            l_B += f_X[r_B]
            r_B += g_X[l_B]
        return l_B % self._a * self._b + r_B % self._b


def _scaled(words_X: NDArray[np.uint64], bound: int) -> Ints:
    """Maps random words below 2**32 to [0, bound)."""
    return (words_X * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


@dataclass(frozen=True)
class FullOrder:
    """Each epoch is a permutation of all samples."""

    seed: int
    num_samples: int

    def ids(self, epoch: int, offsets_B: Ints) -> Ints:
        """Returns the samples at offsets in [0, num_samples) of an epoch, int64."""
        return permutation(self.seed, epoch, self.num_samples)(offsets_B)

    def replacements(self, epoch: int, sample: int, u_T: NDArray[np.float64]) -> Ints:
        """Maps uniform numbers in [0, 1) to samples that may replace one in an epoch: all of them."""
        return (u_T * self.num_samples).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Windows:
    """An epoch's shards in random order, and their division into windows; what a cache of shards must know.

    Attributes:
        shards_S: the shards in order; window w has those from w * size to (w + 1) * size.
        size: number of shards per window; the last window may have fewer.
        first_offsets_W1: offset in the epoch of each window's first sample, and the number of samples, int64.
        first_offsets_S1: the same for these shards, before the samples of a window are shuffled.
    """

    shards_S: Ints
    size: int
    first_offsets_W1: Ints
    first_offsets_S1: Ints

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
    """Each epoch shuffles the shards, groups them into windows, and shuffles the samples within each window.

    So few shards are read at a time. Shard s has the samples from `first_rows_S1[s]` to `first_rows_S1[s + 1]`; none is
    allowed. Memory is proportional to the number of shards.
    """

    seed: int
    first_rows_S1: Ints = field(repr=False)
    window: int

    def windows(self, epoch: int) -> Windows:
        """Returns the windows of an epoch."""
        return self._cached_windows(epoch)

    def window_of(self, epoch: int, offset: int) -> int:
        """Returns the window at an offset in an epoch."""
        return int(self.windows(epoch).at(np.array(offset)))

    def ids(self, epoch: int, offsets_B: Ints) -> Ints:
        """Returns the samples at offsets in [0, num_samples) of an epoch, int64."""
        windows = self.windows(epoch)
        windows_B = windows.at(offsets_B)
        places_B = np.empty_like(offsets_B)
        for window in np.unique(windows_B).tolist():
            first, end = windows.first_offsets_W1[window : window + 2].tolist()
            mask_B = windows_B == window
            shuffled = permutation(self.seed, epoch, end - first, window)
            places_B[mask_B] = first + shuffled(offsets_B[mask_B] - first)
        return self._samples(windows, places_B)

    def replacements(self, epoch: int, sample: int, u_T: NDArray[np.float64]) -> Ints:
        """Maps uniform numbers in [0, 1) to samples that may replace one in an epoch: those of its window."""
        windows = self.windows(epoch)
        shard = self.first_rows_S1.searchsorted(sample, "right") - 1
        window = int(np.flatnonzero(windows.shards_S == shard)[0]) // self.window
        first, end = windows.first_offsets_W1[window : window + 2].tolist()
        return self._samples(windows, first + (u_T * (end - first)).astype(np.int64))

    def _samples(self, windows: Windows, places_B: Ints) -> Ints:
        """Returns the samples at places in the shuffled shards, before samples are shuffled."""
        shards_B = windows.first_offsets_S1.searchsorted(places_B, "right") - 1
        return self.first_rows_S1[windows.shards_S[shards_B]] + places_B - windows.first_offsets_S1[shards_B]

    @cached_property
    def _cached_windows(self) -> Callable[[int], Windows]:
        return lru_cache(2)(self._windows)

    def _windows(self, epoch: int) -> Windows:
        num_shards = len(self.first_rows_S1) - 1
        shards_S = permutation(self.seed, epoch, num_shards, purpose=SHUFFLE_SHARDS)(np.arange(num_shards))
        first_offsets_S1 = np.append(0, np.cumsum(np.diff(self.first_rows_S1)[shards_S]))
        first_offsets_W1 = first_offsets_S1[[*range(0, num_shards, self.window), num_shards]]
        return Windows(shards_S, self.window, first_offsets_W1, first_offsets_S1)


Order = FullOrder | WindowedOrder
