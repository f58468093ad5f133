"""Reads encoded samples in threads, checks them, and replaces corrupt ones."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import NotAnImage, dali_matches_pil, ignore_pil_warnings, to_netpbm
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import PlannedBatch, TrainPlan
from pipeline.errors import CorruptSample, DataError

_NOTHING = np.empty(0, np.uint8)
_UNDECODABLE = np.zeros(1, np.uint8)  # no decoder accepts it


@dataclass(frozen=True)
class ReadBatch:
    """A planned batch with its samples' encoded bytes; `requested` is the plan before corrupt samples were replaced."""

    planned: PlannedBatch
    requested: PlannedBatch
    encoded: list[NDArray[np.uint8]]

    def decode_inputs(self) -> tuple[Any, ...]:
        """Returns DALI's inputs for decoding: encoded bytes, window starts and window shapes."""
        return self.encoded, self.planned.window_starts_B2, self.planned.window_shapes_B2

    def resize_inputs(self) -> tuple[Any, ...]:
        """Returns DALI's inputs after decoding: region starts and ends, output sizes and flips."""
        p = self.planned
        starts_B2, ends_B2 = p.regions()
        side_B2 = np.full((len(p), 2), p.side, np.int32)
        return starts_B2.astype(np.float32), ends_B2.astype(np.float32), side_B2, p.flips_B

    def auto_augment_inputs(self) -> tuple[Any, ...]:
        """Returns DALI's inputs for RandAugment and TrivialAugment; empty if they are disabled."""
        planned = self.planned.augmentations.auto_augment
        return () if planned is None else (planned.ops_BM, planned.bins_BM, planned.signs_BM)


class Reader:
    """Reads the samples of planned batches with `threads` threads; 0: in the caller's thread.

    With `replacement_plan`, the plan of the batches, corrupt samples are replaced and listed in `skipped` with the
    reason; the replacement depends only on seed, epoch and sample. Without it they are errors. PIL decodes the samples
    in `pil_samples` and all formats whose pixels may differ between DALI and PIL; DALI gets the decoded pixels.
    """

    def __init__(self, index: DatasetIndex, threads: int, replacement_plan: TrainPlan | None) -> None:
        self.skipped: dict[int, str] = {}
        self.pil_samples: set[int] = set()
        self._index, self._replacement_plan = index, replacement_plan
        self._num_parts = max(1, threads)
        self._pool = ThreadPoolExecutor(threads, "read") if threads else None

    @property
    def replaces(self) -> bool:
        """Whether corrupt samples are replaced."""
        return self._replacement_plan is not None

    def close(self) -> None:
        """Stops the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def read(self, planned: PlannedBatch) -> ReadBatch:
        """Reads a batch.

        Raises:
            DataError: a sample's file is missing; or the sample and all its replacements are corrupt.
            CorruptSample: a sample is corrupt, and corrupt samples are not replaced.
        """
        parts = [slice(i, None, self._num_parts) for i in range(self._num_parts)]
        each = map if self._pool is None else self._pool.map
        ids_B, encoded = planned.ids_B.copy(), [_NOTHING] * len(planned)
        for part, read in zip(parts, each(partial(self._read_part, planned), parts), strict=True):
            ids_B[part] = [sample for sample, _ in read]
            encoded[part] = [content for _, content in read]
        actual = planned
        if self._replacement_plan is not None and (ids_B != planned.ids_B).any():
            actual = self._replacement_plan.replaced(planned, ids_B)
        return ReadBatch(actual, planned, encoded)

    def corrupt(self, samples: Iterable[int]) -> dict[int, str]:
        """Returns the samples that PIL cannot decode, with the reason."""
        found = {}
        with ignore_pil_warnings():
            for sample in samples:
                try:
                    to_netpbm(self._index.read(sample).tobytes(), *self._size(sample))
                except NotAnImage as error:
                    found[sample] = f"{self._index.describe(sample)}: {error}"
        return found

    def _read_part(self, planned: PlannedBatch, part: slice) -> list[tuple[int, NDArray[np.uint8]]]:
        """Reads one thread's part of a batch; returns samples and their encoded bytes."""
        if self._replacement_plan is None:
            return [(sample, self._read_encoded_or_undecodable(sample)) for sample in planned.ids_B[part].tolist()]
        samples = zip(planned.epochs_B[part].tolist(), planned.ids_B[part].tolist(), strict=True)
        return [self._read_or_replace(self._replacement_plan, epoch, sample) for epoch, sample in samples]

    def _read_encoded(self, sample: int) -> NDArray[np.uint8]:
        """Returns a sample's bytes; or its pixels, decoded by PIL, where DALI's might differ.

        Raises:
            CorruptSample: as `DatasetIndex.read`.
            NotAnImage: PIL cannot decode it.
        """
        content = self._index.read(sample)
        if sample not in self.pil_samples and dali_matches_pil(content.data):
            return content
        return np.frombuffer(to_netpbm(content.tobytes(), *self._size(sample)), np.uint8)

    def _read_encoded_or_undecodable(self, sample: int) -> NDArray[np.uint8]:
        """As `_read_encoded`, but defers a decoding error: DALI fails, and the loader reports it with that batch."""
        try:
            return self._read_encoded(sample)
        except NotAnImage:
            return _UNDECODABLE

    def _read_or_replace(self, plan: TrainPlan, epoch: int, sample: int) -> tuple[int, NDArray[np.uint8]]:
        """Returns the sample, or the first of its replacements that is valid."""
        for candidate in chain([sample], plan.replacements(epoch, sample)):
            if candidate in self.skipped:
                continue
            try:
                return candidate, self._read_encoded(candidate)
            except CorruptSample as error:
                self.skipped[candidate] = str(error)
            except NotAnImage as error:
                self.skipped[candidate] = f"{self._index.describe(candidate)}: {error}"
        raise DataError(f"{self.skipped[sample]} All its replacements are corrupt too.")

    def _size(self, sample: int) -> tuple[int, int]:
        return int(self._index.widths_N[sample]), int(self._index.heights_N[sample])
