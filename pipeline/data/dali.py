"""Pixels: DALI decodes, resizes and normalises what the plan asks for. The one place that knows DALI."""

import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image

from pipeline.config import Device, Interpolation, Rgb
from pipeline.data.folders import listed
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import Ints, PlannedBatch
from pipeline.errors import DataError

_AHEAD = 2  # batches read ahead of DALI, which holds as many more
_READERS = 4  # threads that read a batch's files: storage with latency needs several requests at once
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

    Reading runs ahead in threads of its own and DALI decodes ahead in others, so the caller waits only when both are
    slower than it is. There is no state from one `run` to the next.
    """

    def __init__(
        self,
        index: DatasetIndex,
        *,
        device: Device,
        device_id: int | None,
        threads: int,
        max_batch_size: int,
        output_size: int,
        interpolation: Interpolation,
        mean: Rgb,
        std: Rgb,
    ) -> None:
        self.index, self.output_size = index, output_size
        self.device = torch.device(device) if device_id is None else torch.device(device, device_id)
        self._labels_N = torch.from_numpy(index.labels_N)
        self._planner = ThreadPoolExecutor(1, "plan")
        self._readers = ThreadPoolExecutor(_READERS, "read")
        self._current: _Run | None = None
        self._closed = False
        self._new_pipeline = partial(
            _pipeline,
            source=self._next_input,
            decoder="mixed" if device == "cuda" else "cpu",
            output_size=output_size,
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
            self.close()
            fault = self._diagnosis(error, run)
            if fault is None:
                raise
            raise fault from error
        return self._batch(images, run.in_dali.popleft())

    def _load_next(self, run: "_Run") -> None:
        run.ahead.append(self._planner.submit(self._load, run.batches))

    def _load(self, batches: Iterator[PlannedBatch]) -> "_Input | None":
        """Plans and reads the next batch (in the planner's thread); None after the last one."""
        planned = next(batches, None)
        if planned is None:
            return None
        return _Input(planned, list(self._readers.map(self.index.read, planned.ids_B)))

    def _next_input(self) -> tuple[Any, ...]:
        """DALI's request for the next batch."""
        run = self._current
        if run is None or not run.ahead:
            raise StopIteration
        loaded = run.ahead.popleft().result()
        if loaded is None:
            run.ahead.clear()
            raise StopIteration
        self._load_next(run)
        run.in_dali.append(loaded.planned.ids_B)
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
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # a damaged file beyond where the run was left: it is named by a run that asks for it
            self._pipeline = self._new_pipeline()
        self._current = None

    def _diagnosis(self, error: RuntimeError, run: "_Run") -> DataError | None:
        """Names the files that cannot be decoded, of the batches that DALI held; None if the fault lies elsewhere."""
        paths = [self.index.path(sample) for ids_B in run.in_dali for sample in ids_B]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF blocks and of large pictures, which are no faults here
            damaged = [f"{path}: {fault}" for path in paths if (fault := _decode_fault(path)) is not None]
        if damaged:
            return DataError("damaged image files:\n  " + listed(damaged, "\n  ") + "\nReplace or remove them.")
        if "fn.decoders" not in str(error):
            return None
        reason = next(filter(str.strip, str(error).partition("encountered:")[2].splitlines()), str(error))
        return DataError(
            f"DALI cannot decode one of these files, although PIL can ({reason}):\n  "
            + listed([str(path) for path in paths], "\n  ")
            + "\nConvert it to an 8-bit JPEG or PNG, or remove it."
        )


@dataclass
class _Run:
    """What is under way: the plan, the batches that are being read, and the samples of those that DALI holds."""

    batches: Iterator[PlannedBatch]
    ahead: "deque[Future[_Input | None]]" = field(default_factory=deque)
    in_dali: deque[Ints] = field(default_factory=deque)


@dataclass(frozen=True)
class _Input:
    """A planned batch with the encoded bytes of its files."""

    planned: PlannedBatch
    encoded: list[NDArray[np.uint8]]

    def arrays(self) -> tuple[Any, ...]:
        p = self.planned
        sizes_B2 = p.sizes_B2.astype(np.float32)
        return self.encoded, p.window_starts_B2, p.window_shapes_B2, sizes_B2, p.origins_B2, p.flips_B


@pipeline_def
def _pipeline(
    source: Any, decoder: str, output_size: int, interpolation: Any, mean: list[float], std: list[float]
) -> Any:
    """One pipeline for training and evaluation: decode a window, resize, cut, mirror, normalise.

    Decoding is bit-identical to PIL's on the CPU; EXIF orientation is not applied, as in torchvision.
    """
    encoded, start, shape, size, origin, flip = fn.external_source(
        source=source,
        num_outputs=6,
        dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, types.INT32],
        ndim=[1, 1, 1, 1, 1, 0],
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
    images = fn.slice(images, start=origin, shape=[output_size, output_size], axis_names="HW")
    return fn.crop_mirror_normalize(images, mirror=flip, mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW")


def _decode_fault(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        return str(error)
    return None
