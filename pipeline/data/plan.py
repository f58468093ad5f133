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

from pipeline.config import Augment
from pipeline.data.augment import Augmentations, augmentations, tries
from pipeline.data.philox import CROP, REPLACE, SHUFFLE, SHUFFLE_SHARDS, Ints, draw, philox

_TRIES = 10
_CHUNK = 1 << 14  # samples whose random words fit the processor's cache


def permutation(seed: int, epoch: int, num_samples: int, windows_N: Ints | None = None, purpose: int = SHUFFLE) -> Ints:
    """The order of the samples in an epoch: they are sorted by as many random bits as fit beside their numbers.

    With `windows_N`, samples are sorted by the number of their window first, and mixed within each.
    """
    id_bits = max(1, (num_samples - 1).bit_length())
    window_bits = 0 if windows_N is None else int(windows_N.max()).bit_length()
    keys_N = np.empty(num_samples, np.uint64)
    for start in range(0, num_samples, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, num_samples), dtype=np.uint64)
        words = philox((ids, np.uint64(epoch), np.uint64(0), np.uint64(purpose)), seed)  # type: ignore[arg-type]
        keys_N[start : start + len(ids)] = (words[0] << np.uint64(32) | words[1]) >> np.uint64(window_bits)
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
    place_of_file[permutation(seed, epoch, num_files, purpose=SHUFFLE_SHARDS)] = np.arange(num_files)
    return permutation(seed, epoch, len(files_N), windows_N=place_of_file[files_N] // window)


@dataclass(frozen=True)
class PlannedBatch:
    """What to decode and how to cut it, for a batch of B samples.

    The window (top-left `window_starts_B2`, size `window_shapes_B2`) of the stored image is decoded and resized to
    `sizes_B2`; a square of `side` pixels is cut from it at `origins_B2`, and mirrored where `flips_B` is 1. All pairs
    are (vertical, horizontal), in pixels, int32. In evaluation positions are ids, and epochs 0.
    """

    positions_B: Ints
    epochs_B: Ints
    ids_B: Ints
    window_starts_B2: NDArray[np.int32]
    window_shapes_B2: NDArray[np.int32]
    sizes_B2: NDArray[np.int32]
    origins_B2: NDArray[np.int32]
    flips_B: NDArray[np.int32]
    side: int
    augmentations: Augmentations = field(default_factory=Augmentations)

    def __len__(self) -> int:
        return len(self.ids_B)

    def regions(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where the squares begin and end in the windows: [B, 2] each, in pixels of the windows before the resize."""
        scales_B2 = self.window_shapes_B2 / self.sizes_B2
        return self.origins_B2 * scales_B2, (self.origins_B2 + self.side) * scales_B2


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """Random-resized crops and flips in shuffled order; arguments as in `pipeline.config.Data`.

    `files_N` gives each sample's shard, for the windowed shuffle in windows of `window` shards; None: the full one.
    """

    seed: int
    widths_N: Ints = field(repr=False)
    heights_N: Ints = field(repr=False)
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    files_N: Ints | None = field(default=None, repr=False)
    window: int = 1
    augment: Augment = field(default_factory=Augment)

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
        """Plans the samples at positions of the run's sample order, as images of `side` pixels."""
        return self._planned(positions_B, *self.locate(positions_B), side)

    def replaced(self, planned: PlannedBatch, ids_B: Ints) -> PlannedBatch:
        """The batch with other samples at its positions, as they are seen in that epoch."""
        return self._planned(planned.positions_B, planned.epochs_B, ids_B, planned.side)

    def replacements(self, epoch: int, sample: int) -> Iterator[int]:
        """Samples to take the place of a corrupt one in an epoch, in this order: 32, drawn at random."""
        u_41T = draw(self.seed, np.array([epoch]), np.array([sample]), {REPLACE: 8})[REPLACE]
        yield from (u_41T * len(self)).astype(np.int64).ravel().tolist()

    def _planned(self, positions_B: Ints, epochs_B: Ints, ids_B: Ints, side: int) -> PlannedBatch:
        """Windows by torchvision's `RandomResizedCrop`.

        That is up to ten tries of a share of the area, uniform in `scale`, and a ratio, log-uniform in
        `ratio`; then the largest centered window of a legal ratio.
        """
        draws = draw(self.seed, epochs_B, ids_B, {CROP: _TRIES + 1} | tries(self.augment))
        u_4BT = draws[CROP]
        starts_B2, shapes_B2 = self._windows(self.heights_N[ids_B], self.widths_N[ids_B], u_4BT[..., :_TRIES])
        return PlannedBatch(
            positions_B=positions_B,
            epochs_B=epochs_B,
            ids_B=ids_B,
            window_starts_B2=starts_B2,
            window_shapes_B2=shapes_B2,
            sizes_B2=np.full((len(ids_B), 2), side, np.int32),
            origins_B2=np.zeros((len(ids_B), 2), np.int32),
            flips_B=(u_4BT[0, :, _TRIES] < self.hflip).astype(np.int32),
            side=side,
            augmentations=augmentations(self.augment, self.seed, positions_B, draws, side),
        )

    def _windows(
        self, heights_B: Ints, widths_B: Ints, u_4BT: NDArray[np.float64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Window starts and shapes from four uniform numbers for each sample and try."""
        batch = np.arange(len(heights_B))
        low, high = self.scale
        areas_BT = (heights_B * widths_B)[:, None] * (low + (high - low) * u_4BT[0])
        log_low, log_high = np.log(self.ratio)
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
        tall_B, wide_B = ratio_B < self.ratio[0], ratio_B > self.ratio[1]
        wide_h_B[tall_B] = np.rint(widths_B[tall_B] / self.ratio[0]).clip(1)
        narrow_w_B[wide_B] = np.rint(heights_B[wide_B] * self.ratio[1]).clip(1)
        h_B, w_B = np.where(none_B, wide_h_B, h_B), np.where(none_B, narrow_w_B, w_B)
        y_B, x_B = np.where(none_B, (heights_B - h_B) // 2, y_B), np.where(none_B, (widths_B - w_B) // 2, x_B)
        return np.stack([y_B, x_B], axis=1).astype(np.int32), np.stack([h_B, w_B], axis=1).astype(np.int32)


@dataclass(frozen=True)
class EvalPlan:
    """Shorter-side resize and crop; sizes as in `pipeline.config.Eval`.

    `anchor` is the crop's place from top to bottom and from left to right, each in [0, 1].
    """

    widths_N: Ints = field(repr=False)
    heights_N: Ints = field(repr=False)
    resize: int
    crop: int
    anchor: tuple[float, float] = (0.5, 0.5)

    def batch(self, ids_B: Ints) -> PlannedBatch:
        """Plans whole images by torchvision's rules.

        `Resize(int)`: the shorter side becomes `resize`, the longer `int(resize * long / short)`; `CenterCrop`: the
        crop starts at `int(round((side - crop) / 2))`.
        """
        shapes_B2 = np.stack([self.heights_N[ids_B], self.widths_N[ids_B]], axis=1)
        short_B1 = shapes_B2.min(axis=1, keepdims=True)
        sizes_B2 = (self.resize * shapes_B2 / short_B1).astype(np.int64)
        return PlannedBatch(
            positions_B=ids_B,
            epochs_B=np.zeros_like(ids_B),
            ids_B=ids_B,
            window_starts_B2=np.zeros_like(shapes_B2, np.int32),
            window_shapes_B2=shapes_B2.astype(np.int32),
            sizes_B2=sizes_B2.astype(np.int32),
            origins_B2=np.rint((sizes_B2 - self.crop) * self.anchor).astype(np.int32),
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
