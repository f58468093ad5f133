"""Encoded samples: read in threads, looked at, and replaced where they are corrupt. What decodes them is elsewhere."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import NotAnImage, in_common, netpbm, quiet
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import PlannedBatch, TrainPlan
from pipeline.errors import CorruptSample, DataError

_NOTHING = np.empty(0, np.uint8)
_ODD = np.zeros(1, np.uint8)  # no image


@dataclass(frozen=True)
class ReadBatch:
    """A planned batch with the encoded bytes of its samples; `wanted` is the plan before corrupt ones were replaced."""

    planned: PlannedBatch
    wanted: PlannedBatch
    encoded: list[NDArray[np.uint8]]

    def windows(self) -> tuple[Any, ...]:
        """What decoding needs."""
        return self.encoded, self.planned.window_starts_B2, self.planned.window_shapes_B2

    def pixels(self) -> tuple[Any, ...]:
        """What comes after it."""
        p = self.planned
        starts_B2, ends_B2 = p.regions()
        side_B2 = np.full((len(p), 2), p.side, np.int32)
        return starts_B2.astype(np.float32), ends_B2.astype(np.float32), side_B2, p.flips_B

    def auto(self) -> tuple[Any, ...]:
        """Which augmentations the decoder is to apply, where it is to."""
        planned = self.planned.augmentations.auto
        return () if planned is None else (planned.ops_BM, planned.bins_BM, planned.signs_BM)


class Reader:
    """Reads the samples of planned batches in `threads` threads; with 0 of them the caller's reads.

    With `skip_by`, the plan of the batches, corrupt samples are replaced by others that follow from the seed, the epoch
    and the sample alone, and are listed in `skipped`, with what is wrong; without it they are errors. The samples in
    `by_pil`, and those of kinds that the decoder may take for other pixels than PIL, are handed on as PIL decodes them.
    """

    def __init__(self, index: DatasetIndex, threads: int, skip_by: TrainPlan | None) -> None:
        self.skipped: dict[int, str] = {}
        self.by_pil: set[int] = set()
        self._index, self._skip_by = index, skip_by
        self._num_shares = max(1, threads)
        self._pool = ThreadPoolExecutor(threads, "read") if threads else None

    @property
    def replaces(self) -> bool:
        """Whether corrupt samples are replaced."""
        return self._skip_by is not None

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def read(self, planned: PlannedBatch) -> ReadBatch:
        """Reads a batch.

        Raises:
            DataError: a sample has gone; or it is corrupt, and so are all that were to take its place.
            CorruptSample: a sample is corrupt, and none is replaced.
        """
        shares = [slice(i, None, self._num_shares) for i in range(self._num_shares)]
        each = map if self._pool is None else self._pool.map
        ids_B, encoded = planned.ids_B.copy(), [_NOTHING] * len(planned)
        for share, read in zip(shares, each(partial(self._share, planned), shares), strict=True):
            ids_B[share] = [sample for sample, _ in read]
            encoded[share] = [content for _, content in read]
        taken = planned
        if self._skip_by is not None and (ids_B != planned.ids_B).any():
            taken = self._skip_by.replaced(planned, ids_B)
        return ReadBatch(taken, planned, encoded)

    def corrupt(self, samples: Iterable[int]) -> dict[int, str]:
        """Those of the samples that PIL cannot decode, and why."""
        found = {}
        with quiet():
            for sample in samples:
                try:
                    netpbm(self._index.read(sample).tobytes(), *self._size(sample))
                except NotAnImage as error:
                    found[sample] = f"{self._index.describe(sample)}: {error}"
        return found

    def _share(self, planned: PlannedBatch, share: slice) -> list[tuple[int, NDArray[np.uint8]]]:
        """One thread's share of a batch: the samples read, and what is to be decoded."""
        if self._skip_by is None:
            return [(sample, self._encoded_or_odd(sample)) for sample in planned.ids_B[share].tolist()]
        samples = zip(planned.epochs_B[share].tolist(), planned.ids_B[share].tolist(), strict=True)
        return [self._read_or_replace(self._skip_by, epoch, sample) for epoch, sample in samples]

    def _encoded(self, sample: int) -> NDArray[np.uint8]:
        """A sample's bytes, or its pixels as PIL decodes them where the decoder's might be others.

        Raises:
            CorruptSample: as the index's `read`.
            NotAnImage: PIL cannot decode it.
        """
        content = self._index.read(sample)
        if sample not in self.by_pil and in_common(content.data):
            return content
        return np.frombuffer(netpbm(content.tobytes(), *self._size(sample)), np.uint8)

    def _encoded_or_odd(self, sample: int) -> NDArray[np.uint8]:
        """`_encoded`, or what no decoder takes, so that the problem is told when the batch is asked for."""
        try:
            return self._encoded(sample)
        except NotAnImage:
            return _ODD

    def _read_or_replace(self, plan: TrainPlan, epoch: int, sample: int) -> tuple[int, NDArray[np.uint8]]:
        """The sample, or the first valid one of those that take its place."""
        for candidate in chain([sample], plan.replacements(epoch, sample)):
            if candidate in self.skipped:
                continue
            try:
                return candidate, self._encoded(candidate)
            except CorruptSample as error:
                self.skipped[candidate] = str(error)
            except NotAnImage as error:
                self.skipped[candidate] = f"{self._index.describe(candidate)}: {error}"
        raise DataError(f"{self.skipped[sample]} All that were to take its place are corrupt too.")

    def _size(self, sample: int) -> tuple[int, int]:
        return int(self._index.widths_N[sample]), int(self._index.heights_N[sample])
