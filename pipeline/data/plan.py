"""Stateless samplers: the shuffled sample order, random-resized crops and flips, as functions of (seed, epoch, sample).

Position `p` of the run's sample order gives `epoch, i = divmod(p, N)`, the epoch's permutation (`pipeline.data.order`)
gives the sample, and a counter-based generator keyed by (seed, epoch, sample) gives its crop window and flip. So the
global batches do not depend on the number of workers, on gradient accumulation or on restarts, and training resumes at
any sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.config_data import Augment
from pipeline.data.augment import Augmentations, draw_counts, plan_augmentations
from pipeline.data.order import FullOrder, Order, WindowedOrder
from pipeline.data.philox import CROP, REPLACE, Ints, draw

Sides = NDArray[np.int32] | NDArray[np.int64]  # widths or heights of all samples, pixels

_TRIES = 10


@dataclass(frozen=True)
class PlannedBatch:
    """A sampler's output for a batch of B samples: what to decode, resize, crop, flip and augment.

    The window (top-left `window_starts_B2`, size `window_shapes_B2`) of the stored image is decoded and resized to
    `sizes_B2`; a square of `side` pixels is cropped from it at `origins_B2`, and mirrored if `flips_B` is 1. All pairs
    are (vertical, horizontal), in pixels, int32. In evaluation, positions equal ids and epochs are 0.
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
        """Returns the crops' starts and ends in the windows: [B, 2] each, in pixels before the resize."""
        scales_B2 = self.window_shapes_B2 / self.sizes_B2
        return self.origins_B2 * scales_B2, (self.origins_B2 + self.side) * scales_B2


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """The training sampler: shuffled order, random-resized crops and flips; arguments as in `config_data.Data`.

    With `first_rows_S1`, the shuffle is within windows of `window` shards, and shard s has the samples from
    `first_rows_S1[s]` to `first_rows_S1[s + 1]`; None: full shuffle.
    """

    seed: int
    widths_N: Sides = field(repr=False)
    heights_N: Sides = field(repr=False)
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    first_rows_S1: Ints | None = field(default=None, repr=False)
    window: int = 1
    augment: Augment = field(default_factory=Augment)

    def __len__(self) -> int:
        return len(self.widths_N)

    @cached_property
    def order(self) -> Order:
        """The order of each epoch."""
        if self.first_rows_S1 is None:
            return FullOrder(self.seed, len(self))
        return WindowedOrder(self.seed, self.first_rows_S1, self.window)

    def locate(self, positions_B: Ints) -> tuple[Ints, Ints]:
        """Returns epochs and sample ids at positions of the run's sample order."""
        epochs_B, offsets_B = np.divmod(positions_B, len(self))
        ids_B = np.empty_like(positions_B)
        for epoch in np.unique(epochs_B).tolist():
            mask_B = epochs_B == epoch
            ids_B[mask_B] = self.order.ids(epoch, offsets_B[mask_B])
        return epochs_B, ids_B

    def batch(self, positions_B: Ints, side: int) -> PlannedBatch:
        """Plans the samples at positions of the run's sample order; images have `side` x `side` pixels."""
        return self._plan(positions_B, *self.locate(positions_B), side)

    def replaced(self, planned: PlannedBatch, ids_B: Ints) -> PlannedBatch:
        """Plans the same positions and epochs with other samples."""
        return self._plan(planned.positions_B, planned.epochs_B, ids_B, planned.side)

    def replacements(self, epoch: int, sample: int) -> Iterator[int]:
        """Yields 32 random candidates to replace a corrupt sample in an epoch, in order of preference.

        With the windowed shuffle they are from the sample's window, whose shards are read at that time anyway.
        """
        u_41T = draw(self.seed, np.array([epoch]), np.array([sample]), {REPLACE: 8})[REPLACE]
        yield from self.order.replacements(epoch, sample, u_41T.ravel()).tolist()

    def _plan(self, positions_B: Ints, epochs_B: Ints, ids_B: Ints, side: int) -> PlannedBatch:
        """Plans crop windows as torchvision's `RandomResizedCrop`.

        Up to ten attempts draw a fraction of the area, uniform in `scale`, and an aspect ratio, log-uniform in `ratio`.
        If none fits, the window is the largest centered one with an allowed ratio.
        """
        draws = draw(self.seed, epochs_B, ids_B, {CROP: _TRIES + 1} | draw_counts(self.augment))
        u_4BT = draws[CROP]
        heights_B, widths_B = _sides(self.heights_N, ids_B), _sides(self.widths_N, ids_B)
        starts_B2, shapes_B2 = self._windows(heights_B, widths_B, u_4BT[..., :_TRIES])
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
            augmentations=plan_augmentations(self.augment, self.seed, positions_B, draws, side),
        )

    def _windows(
        self, heights_B: Ints, widths_B: Ints, u_4BT: NDArray[np.float64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns window starts and shapes from four uniform numbers per sample and attempt."""
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
    """The evaluation sampler: shorter-side resize and crop; sizes as in `config_data.Eval`.

    `anchor` is the crop's (vertical, horizontal) position, each in [0, 1]; (0.5, 0.5): center crop.
    """

    widths_N: Sides = field(repr=False)
    heights_N: Sides = field(repr=False)
    resize: int
    crop: int
    anchor: tuple[float, float] = (0.5, 0.5)

    def batch(self, ids_B: Ints) -> PlannedBatch:
        """Plans whole images by torchvision's rules.

        `Resize(int)`: the shorter side becomes `resize`, the longer `int(resize * long / short)`. `CenterCrop`: the
        crop starts at `int(round((side - crop) / 2))`.
        """
        shapes_B2 = np.stack([_sides(self.heights_N, ids_B), _sides(self.widths_N, ids_B)], axis=1)
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


def _sides(sides_N: Sides, ids_B: Ints) -> Ints:
    return sides_N[ids_B].astype(np.int64)


def micro_batch(
    step: int, micro: int, rank: int, workers: int, device_batch: int, gradient_accumulation_steps: int
) -> Ints:
    """Returns the positions of one rank's micro-batch; all ranks' micro-batches make up the step's global batch."""
    first = ((step * gradient_accumulation_steps + micro) * workers + rank) * device_batch
    return np.arange(first, first + device_batch)


def rank_eval_batches(num_samples: int, rank: int, workers: int, batch_size: int) -> Iterator[Ints]:
    """Yields one rank's evaluation batches of sample ids; over all ranks each id occurs once, without padding.

    Ranks' numbers of samples differ by at most one, so their numbers of batches differ by at most one.
    """
    first, last = rank * num_samples // workers, (rank + 1) * num_samples // workers
    for start in range(first, last, batch_size):
        yield np.arange(start, min(start + batch_size, last))
