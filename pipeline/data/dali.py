"""Pixels: DALI decodes, resizes and normalises what the plan asks for. The one place that knows DALI."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.pytorch import feed_ndarray

from pipeline.config import Device, Interpolation, Rgb
from pipeline.data.folders import listed
from pipeline.data.images import NotAnImage, decode, quiet
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import Ints, PlannedBatch, TrainPlan
from pipeline.errors import DamagedSample, DataError

_AHEAD = 2  # batches read ahead of DALI, which holds as many more
_FILTERS = {"bilinear": types.INTERP_TRIANGULAR, "bicubic": types.INTERP_CUBIC}


@dataclass(frozen=True)
class Batch:
    """Pictures ready for the model, on its device.

    `images_NCHW` is normalised fp32, `labels_N` int64, `ids_N` the samples' rows in the index.
    """

    images_NCHW: torch.Tensor
    labels_N: torch.Tensor
    ids_N: Ints


class Loader:
    """Turns planned batches into pixels; use as a context manager, or close it.

    Reading runs ahead in threads of its own (`readers` of them; with 0 the planning thread reads) and DALI decodes
    ahead in others, so the caller waits only when both are slower than it is. There is no state from one `run` to the
    next but which samples are damaged. With `skip_by`, the plan of the batches, damaged samples are replaced by others
    that follow from the seed, the epoch and the sample alone, and are listed in `skipped`; without it they are errors.
    """

    def __init__(
        self,
        index: DatasetIndex,
        *,
        device: Device,
        device_id: int | None,
        threads: int,
        max_batch_size: int,
        interpolation: Interpolation,
        mean: Rgb,
        std: Rgb,
        readers: int = 4,
        skip_by: TrainPlan | None = None,
    ) -> None:
        self.index = index
        self.device = torch.device(device) if device_id is None else torch.device(device, device_id)
        self.skipped: dict[int, str] = {}
        self._skip_by = skip_by
        self._labels_N = torch.from_numpy(index.labels_N)
        self._planner = ThreadPoolExecutor(1, "plan")
        self._readers = ThreadPoolExecutor(readers, "read") if readers else None
        self._current: _Run | None = None
        self._closed = False
        self._new_pipeline = partial(
            _pipeline,
            source=self._next_input,
            decoder="mixed" if device == "cuda" else "cpu",
            interpolation=_FILTERS[interpolation],
            mean=[255 * m for m in mean],
            std=[255 * s for s in std],
            batch_size=max_batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=2,
        )
        self._pipeline = self._new_pipeline()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and frees DALI's memory; the loader cannot be used again."""
        self._closed = True
        self._current = None
        self._planner.shutdown(cancel_futures=True)
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        self._pipeline = None

    def run(self, batches: Iterable[PlannedBatch]) -> Generator[Batch]:
        """Yields the pixels of each planned batch, in order; `batches` is asked for the next ones in a thread.

        A loader does one run at a time: a new one ends one that was left in the middle.

        Raises:
            DataError: a file is damaged or has gone; the message names it. The loader is closed then.
        """
        if self._closed:
            raise RuntimeError("this loader is closed")
        self._drain()
        run = self._current = _Run(iter(batches))
        for _ in range(_AHEAD):
            self._load_next(run)
        try:
            while (batch := self._next_batch(run)) is not None:
                yield batch
        finally:
            if self._current is run:
                self._drain()

    def _next_batch(self, run: "_Run") -> Batch | None:
        while True:
            if self._current is not run:
                raise RuntimeError("this run has ended: its loader was closed or has begun a newer run")
            try:
                (images,) = self._pipeline.run()
            except StopIteration:
                return None
            except DataError:
                self.close()
                raise
            except RuntimeError as error:
                self._recover(run, error)
                continue
            return self._batch(images, run.in_dali.popleft().planned.ids_B)

    def _recover(self, run: "_Run", error: RuntimeError) -> None:
        """After DALI met something that it cannot decode: goes on without it, or says what it is."""
        damaged = self._damaged(run)
        if damaged and self._skip_by is not None:
            self.skipped |= damaged
            run.again.extendleft(loaded.wanted for loaded in reversed(run.in_dali))
            run.in_dali.clear()
            self._pipeline = self._new_pipeline()
            return
        self.close()
        if damaged:
            raise DataError(
                "damaged image files:\n  " + listed(list(damaged.values()), "\n  ") + "\nReplace or remove them."
            ) from error
        if "fn.decoders" not in str(error):
            raise error
        reason = next(filter(str.strip, str(error).partition("encountered:")[2].splitlines()), str(error))
        places = [self.index.describe(sample) for loaded in run.in_dali for sample in loaded.planned.ids_B]
        raise DataError(
            f"DALI cannot decode one of these pictures, although PIL can ({reason}):\n  "
            + listed(places, "\n  ")
            + "\nConvert it to an 8-bit JPEG or PNG, or remove it."
        ) from error

    def _damaged(self, run: "_Run") -> dict[int, str]:
        """Those of the samples in DALI that cannot be decoded, and why."""
        found = {}
        with quiet():
            for sample in {int(sample) for loaded in run.in_dali for sample in loaded.planned.ids_B}:
                try:
                    decode(self.index.read(sample).tobytes()).convert("RGB")
                except NotAnImage as error:
                    found[sample] = f"{self.index.describe(sample)}: {error}"
        return found

    def _load_next(self, run: "_Run") -> None:
        run.ahead.append(self._planner.submit(self._load, run.batches))

    def _load(self, batches: Iterator[PlannedBatch]) -> "_Input | None":
        """Plans and reads the next batch (in the planner's thread); None after the last one."""
        planned = next(batches, None)
        return None if planned is None else self._read(planned)

    def _read(self, planned: PlannedBatch) -> "_Input":
        each = map if self._readers is None else self._readers.map
        if self._skip_by is None:
            return _Input(planned, planned, list(each(self.index.read, planned.ids_B)))
        read = partial(self._read_or_replace, self._skip_by)
        pairs = list(each(read, planned.epochs_B, planned.ids_B))
        ids_B = np.array([sample for sample, _ in pairs])
        taken = planned
        if (ids_B != planned.ids_B).any():
            taken = self._skip_by.samples(planned.epochs_B, ids_B, planned.side)
        return _Input(taken, planned, [content for _, content in pairs])

    def _read_or_replace(self, plan: TrainPlan, epoch: int, sample: int) -> tuple[int, NDArray[np.uint8]]:
        """The sample, or the first sound one of those that take its place."""
        for candidate in (sample, *plan.replacements(epoch, sample)):
            if candidate in self.skipped:
                continue
            try:
                return int(candidate), self.index.read(candidate)
            except DamagedSample as error:
                self.skipped[int(candidate)] = str(error)
        raise DataError(f"{self.skipped[int(sample)]} All that were to take its place are damaged too.")

    def _next_input(self) -> tuple[Any, ...]:
        """DALI's request for the next batch."""
        run = self._current
        if run is None:
            raise StopIteration
        if run.again:
            loaded: _Input | None = self._read(run.again.popleft())
        elif not run.ahead:
            raise StopIteration
        else:
            loaded = run.ahead.popleft().result()
            if loaded is None:
                run.ahead.clear()
                raise StopIteration
            self._load_next(run)
        assert loaded is not None
        run.in_dali.append(loaded)
        return loaded.arrays()

    def _batch(self, images: Any, ids_N: Ints) -> Batch:
        tensor = images.as_tensor()
        images_NCHW = torch.empty(tensor.shape(), dtype=torch.float32, device=self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        feed_ndarray(tensor, images_NCHW, cuda_stream=stream)
        labels_N = self._labels_N[ids_N].to(self.device, non_blocking=True)
        return Batch(images_NCHW, labels_N, ids_N)

    def _drain(self) -> None:
        """Brings the pipeline back to its start, also when the caller stopped in the middle."""
        if self._current is None:
            return
        for future in self._current.ahead:
            future.cancel()
        self._current.ahead.clear()
        self._current.again.clear()
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # a damaged file beyond where the run was left: it is named by a run that asks for it
            self._pipeline = self._new_pipeline()
        self._current = None


@dataclass
class _Run:
    """What is under way: the plan, batches that are being read, those that DALI holds, those that it must get again."""

    batches: Iterator[PlannedBatch]
    ahead: "deque[Future[_Input | None]]" = field(default_factory=deque)
    in_dali: "deque[_Input]" = field(default_factory=deque)
    again: deque[PlannedBatch] = field(default_factory=deque)


@dataclass(frozen=True)
class _Input:
    """A planned batch with the encoded bytes of its samples; `wanted` is the plan before damaged ones were replaced."""

    planned: PlannedBatch
    wanted: PlannedBatch
    encoded: list[NDArray[np.uint8]]

    def arrays(self) -> tuple[Any, ...]:
        p = self.planned
        sizes_B2 = p.sizes_B2.astype(np.float32)
        sides_B2 = np.full((len(p), 2), p.side, np.int32)
        return self.encoded, p.window_starts_B2, p.window_shapes_B2, sizes_B2, p.origins_B2, sides_B2, p.flips_B


@pipeline_def
def _pipeline(source: Any, decoder: str, interpolation: Any, mean: list[float], std: list[float]) -> Any:
    """One pipeline for training and evaluation: decode a window, resize, cut, mirror, normalise.

    Decoding is bit-identical to PIL's on the CPU; EXIF orientation is not applied, as in torchvision.
    """
    encoded, start, shape, size, origin, side, flip = fn.external_source(
        source=source,
        num_outputs=7,
        dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, types.INT32, types.INT32],
        ndim=[1, 1, 1, 1, 1, 1, 0],
    )
    images = fn.decoders.image_slice(
        encoded,
        device=decoder,
        start=start,
        shape=shape,
        axis_names="HW",
        output_type=types.RGB,
        adjust_orientation=False,
        use_fast_idct=False,
    )
    images = fn.resize(images, size=size, interp_type=interpolation, antialias=True)
    images = fn.slice(images, start=origin, shape=side, axis_names="HW")
    return fn.crop_mirror_normalize(images, mirror=flip, mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW")
