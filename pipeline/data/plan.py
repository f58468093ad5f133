"""Which sample comes when, and everything random about it: pure arithmetic on (seed, epoch, sample).

There is no state: position `p` of the run's sample order gives `epoch, i = divmod(p, N)`, the epoch's permutation
gives the sample, and a counter-based generator keyed by (seed, epoch, sample) gives its crop window and its flip.
So the same global batches come whatever the number of workers, the split of the batch or the number of restarts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10

# what random words are for: the counters' last word
_SHUFFLE, _CROP = 0, 1
_SHUFFLE_SHARDS, _REPLACE = 6, 7
_TRIES = 10
_CHUNK = 1 << 14  # samples whose random words fit the processor's cache


def philox(counters_4: tuple[NDArray[np.uint64], ...], seed: int) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), vectorised.

    Written out here so that a run's sample order does not depend on the version of a library.

    Args:
        counters_4: four arrays that broadcast together, values below 2**32.
        seed: the key, below 2**64.

    Returns:
        Random words below 2**32, shape [4, *broadcast shape], uint64.
    """
    c0, c1, c2, c3 = (np.array(c, np.uint64) for c in np.broadcast_arrays(*counters_4))
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(_ROUNDS):
        np.multiply(c0, _M0, out=p0)
        np.multiply(c2, _M1, out=p1)
        # c0, c1, c2, c3 = high(p1) ^ c1 ^ k0, low(p1), high(p0) ^ c3 ^ k1, low(p0), in the arrays that are there
        np.right_shift(p1, _SHIFT, out=c0)
        c0 ^= c1
        c0 ^= k0
        np.right_shift(p0, _SHIFT, out=c2)
        c2 ^= c3
        c2 ^= k1
        np.bitwise_and(p1, _LOW, out=c1)
        np.bitwise_and(p0, _LOW, out=c3)
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words below 2**32 as numbers in [0, 1)."""
    return words.astype(np.float64) * 2.0**-32


def permutation(
    seed: int, epoch: int, num_samples: int, windows_N: Ints | None = None, purpose: int = _SHUFFLE
) -> Ints:
    """The order of the samples in an epoch: they are sorted by as many random bits as fit beside their numbers.

    With `windows_N`, samples are sorted by the number of their window first, and mixed within each.
    """
    id_bits = max(1, (num_samples - 1).bit_length())
    window_bits = 0 if windows_N is None else int(windows_N.max()).bit_length()
    keys_N = np.empty(num_samples, np.uint64)
    for start in range(0, num_samples, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, num_samples), dtype=np.uint64)
        words = philox((ids, np.uint64(epoch), np.uint64(0), np.uint64(purpose)), seed)  # type: ignore[arg-type]
        keys_N[start : start + len(ids)] = (words[0] << _SHIFT | words[1]) >> np.uint64(window_bits)
    if windows_N is not None and window_bits:
        keys_N |= windows_N.astype(np.uint64) << np.uint64(64 - window_bits)
    low = np.uint64((1 << id_bits) - 1)
    # The number in the lowest bits makes all keys distinct, so that any sorting method gives the same order.
    ordered_N = np.sort((keys_N & ~low) | np.arange(num_samples, dtype=np.uint64))
    return (ordered_N & low).astype(np.int64)


def windowed_permutation(seed: int, epoch: int, files_N: Ints, window: int) -> Ints:
    """The order of an epoch for storage that is slow to jump about in: few shards are open at a time.

    The shards are put in random order and cut into windows of `window` shards; samples are mixed within each window.
    """
    num_files = int(files_N.max()) + 1
    place_of_file = np.empty(num_files, np.int64)
    place_of_file[permutation(seed, epoch, num_files, purpose=_SHUFFLE_SHARDS)] = np.arange(num_files)
    return permutation(seed, epoch, len(files_N), windows_N=place_of_file[files_N] // window)


@dataclass(frozen=True)
class PlannedBatch:
    """What to decode and how to cut it, for a batch of B samples.

    The window (top-left `window_starts_B2`, size `window_shapes_B2`) of the stored picture is decoded and resized to
    `sizes_B2`; a square of `side` pixels is cut from it at `origins_B2`, and mirrored where `flips_B` is 1. All pairs
    are (vertical, horizontal), in pixels, int32. `epochs_B` are those of the run's sample order, 0 in evaluation.
    """

    ids_B: Ints
    epochs_B: Ints
    window_starts_B2: NDArray[np.int32]
    window_shapes_B2: NDArray[np.int32]
    sizes_B2: NDArray[np.int32]
    origins_B2: NDArray[np.int32]
    flips_B: NDArray[np.int32]
    side: int

    def __len__(self) -> int:
        return len(self.ids_B)


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """Random-resized crops and flips in shuffled order; arguments as in `pipeline.config.Data`.

    `files_N` gives each sample's shard, for the windowed shuffle in windows of `window` shards; None: the full one.
    """

    seed: int
    widths_N: Ints = field(repr=False)
    heights_N: Ints = field(repr=False)
    crop_area: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    files_N: Ints | None = field(default=None, repr=False)
    window: int = 1

    def __len__(self) -> int:
        return len(self.widths_N)

    @cached_property
    def _order(self) -> Callable[[int], Ints]:
        return lru_cache(2)(self._new_order)

    def _new_order(self, epoch: int) -> Ints:
        if self.files_N is None:
            return permutation(self.seed, epoch, len(self))
        return windowed_permutation(self.seed, epoch, self.files_N, self.window)

    def locate(self, positions_B: Ints) -> tuple[Ints, Ints]:
        """The epochs and the samples at positions of the run's sample order."""
        epochs_B, places_B = np.divmod(positions_B, len(self))
        ids_B = np.empty_like(positions_B)
        for epoch in np.unique(epochs_B):
            here = epochs_B == epoch
            ids_B[here] = self._order(int(epoch))[places_B[here]]
        return epochs_B, ids_B

    def batch(self, positions_B: Ints, side: int) -> PlannedBatch:
        """Plans the samples at positions of the run's sample order, as pictures of `side` pixels."""
        return self.samples(*self.locate(positions_B), side)

    def samples(self, epochs_B: Ints, ids_B: Ints, side: int) -> PlannedBatch:
        """Plans the given samples as they are seen in the given epochs.

        The crop follows torchvision's `RandomResizedCrop`: up to ten tries of a share of the area, uniform in
        `crop_area`, and a ratio, log-uniform in `crop_ratio`; then the largest centred window of a legal ratio.
        """
        u_4BT = self._uniform(epochs_B, ids_B, _TRIES + 1, _CROP)
        starts_B2, shapes_B2 = self._windows(self.heights_N[ids_B], self.widths_N[ids_B], u_4BT[..., :_TRIES])
        return PlannedBatch(
            ids_B=ids_B,
            epochs_B=epochs_B,
            window_starts_B2=starts_B2,
            window_shapes_B2=shapes_B2,
            sizes_B2=np.full((len(ids_B), 2), side, np.int32),
            origins_B2=np.zeros((len(ids_B), 2), np.int32),
            flips_B=(u_4BT[0, :, _TRIES] < self.flip).astype(np.int32),
            side=side,
        )

    def replacements(self, epoch: int, sample: int) -> Ints:
        """Samples to take the place of a damaged one in an epoch, in this order: some thirty, drawn at random."""
        u_41T = self._uniform(np.array([epoch]), np.array([sample]), 8, _REPLACE)
        return (u_41T * len(self)).astype(np.int64).ravel()

    def _uniform(self, epochs_B: Ints, ids_B: Ints, tries: int, purpose: int) -> NDArray[np.float64]:
        """Four numbers in [0, 1) for each sample and try, shape [4, B, tries]."""
        counters = (
            ids_B.astype(np.uint64)[:, None],
            epochs_B.astype(np.uint64)[:, None],
            np.arange(tries, dtype=np.uint64),
            np.full(1, purpose, np.uint64),
        )
        return uniform(philox(counters, self.seed))

    def _windows(
        self, heights_B: Ints, widths_B: Ints, u_4BT: NDArray[np.float64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Window starts and shapes from four uniform numbers for each sample and try."""
        batch = np.arange(len(heights_B))
        low, high = self.crop_area
        areas_BT = (heights_B * widths_B)[:, None] * (low + (high - low) * u_4BT[0])
        log_low, log_high = np.log(self.crop_ratio)
        ratios_BT = np.exp(log_low + (log_high - log_low) * u_4BT[1])
        w_BT = np.rint(np.sqrt(areas_BT * ratios_BT)).astype(np.int64)
        h_BT = np.rint(np.sqrt(areas_BT / ratios_BT)).astype(np.int64)
        fits_BT = (w_BT > 0) & (w_BT <= widths_B[:, None]) & (h_BT > 0) & (h_BT <= heights_B[:, None])
        try_B = fits_BT.argmax(axis=1)
        w_B, h_B = w_BT[batch, try_B], h_BT[batch, try_B]
        y_B = (u_4BT[2, batch, try_B] * (heights_B - h_B + 1)).astype(np.int64)
        x_B = (u_4BT[3, batch, try_B] * (widths_B - w_B + 1)).astype(np.int64)

        none_B = ~fits_BT.any(axis=1)
        narrow_w_B, wide_h_B, ratio_B = widths_B.copy(), heights_B.copy(), widths_B / heights_B
        tall_B, wide_B = ratio_B < self.crop_ratio[0], ratio_B > self.crop_ratio[1]
        wide_h_B[tall_B] = np.rint(widths_B[tall_B] / self.crop_ratio[0])
        narrow_w_B[wide_B] = np.rint(heights_B[wide_B] * self.crop_ratio[1])
        h_B, w_B = np.where(none_B, wide_h_B, h_B), np.where(none_B, narrow_w_B, w_B)
        y_B, x_B = np.where(none_B, (heights_B - h_B) // 2, y_B), np.where(none_B, (widths_B - w_B) // 2, x_B)
        return np.stack([y_B, x_B], axis=1).astype(np.int32), np.stack([h_B, w_B], axis=1).astype(np.int32)


@dataclass(frozen=True)
class EvalPlan:
    """Shorter-side resize and centre crop; arguments as in `pipeline.config.Eval`."""

    widths_N: Ints = field(repr=False)
    heights_N: Ints = field(repr=False)
    resize: int
    crop: int

    def batch(self, ids_B: Ints) -> PlannedBatch:
        """Plans whole pictures by torchvision's rules.

        `Resize(int)`: the shorter side becomes `resize`, the longer `int(resize * long / short)`; `CenterCrop`: the
        crop starts at `int(round((side - crop) / 2))`.
        """
        shapes_B2 = np.stack([self.heights_N[ids_B], self.widths_N[ids_B]], axis=1)
        short_B1 = shapes_B2.min(axis=1, keepdims=True)
        sizes_B2 = (self.resize * shapes_B2 / short_B1).astype(np.int64)
        return PlannedBatch(
            ids_B=ids_B,
            epochs_B=np.zeros_like(ids_B),
            window_starts_B2=np.zeros_like(shapes_B2, np.int32),
            window_shapes_B2=shapes_B2.astype(np.int32),
            sizes_B2=sizes_B2.astype(np.int32),
            origins_B2=np.rint((sizes_B2 - self.crop) / 2).astype(np.int32),
            flips_B=np.zeros(len(ids_B), np.int32),
            side=self.crop,
        )


def micro_batch(step: int, micro: int, rank: int, workers: int, device_batch: int, accumulation: int) -> Ints:
    """Positions of one rank's micro-batch; over ranks and micro-batches they fill the step's global batch."""
    first = ((step * accumulation + micro) * workers + rank) * device_batch
    return np.arange(first, first + device_batch)


def eval_share(num_samples: int, rank: int, workers: int, batch_size: int) -> Iterator[Ints]:
    """One rank's batches of sample ids: over the ranks each id comes once, without padding or dropping.

    Ranks get equally many samples but for one, so some may have one batch more than others.
    """
    first, last = rank * num_samples // workers, (rank + 1) * num_samples // workers
    for start in range(first, last, batch_size):
        yield np.arange(start, min(start + batch_size, last))
