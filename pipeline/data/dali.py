"""Pixels: DALI decodes, resizes and normalizes what the plan asks for. The one place that knows DALI."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.pytorch import feed_ndarray

from pipeline.config import Augment, Device, Interpolation, Rgb
from pipeline.data import batch_ops
from pipeline.data.auto_augment import augmented
from pipeline.data.index import DatasetIndex
from pipeline.data.philox import Ints
from pipeline.data.plan import PlannedBatch, TrainPlan
from pipeline.data.reading import ReadBatch, Reader
from pipeline.data.resize import Resizer
from pipeline.errors import DataError, listed

_AHEAD = 2  # batches read ahead of DALI, which holds as many more
_FILTERS = {"bilinear": types.INTERP_TRIANGULAR, "bicubic": types.INTERP_CUBIC}


@dataclass(frozen=True)
class Batch:
    """Images ready for the model, on its device.

    `images_NCHW` is normalized fp32 (RGB, or luma alone), `labels_N` int64, `ids_N` the samples' rows in the index.
    `targets` are the labels, or, where images are mixed, the classes' shares (fp32, [N, classes]).
    """

    images_NCHW: torch.Tensor
    labels_N: torch.Tensor
    targets: torch.Tensor
    ids_N: Ints


class Loader:
    """Turns planned batches into pixels; use as a context manager, or close it.

    Reading runs ahead in threads of its own (`readers` of them; with 0 the planning thread reads) and DALI decodes
    ahead in others, so the caller waits only when both are slower than it is. There is no state from one `run` to the
    next but which samples are corrupt, and which DALI has refused. With `skip_by`, the plan of the batches, corrupt
    samples are replaced and listed in `skipped`, see `pipeline.data.reading`; without it they are errors.
    `num_classes` is the number of classes in the targets, the index's by default.
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
        augment: Augment | None = None,
        skip_by: TrainPlan | None = None,
        channels: Literal[1, 3] = 3,
        num_classes: int | None = None,
    ) -> None:
        augment = augment or Augment()
        self.index = index
        self.device = torch.device(device) if device_id is None else torch.device(device, device_id)
        self.channels = channels
        self._labels_N = torch.from_numpy(index.labels_N)
        self._planner = ThreadPoolExecutor(1, "plan")
        self._reader = Reader(index, readers, skip_by)
        self.skipped = self._reader.skipped
        self._std = std
        self._augmented = partial(
            batch_ops.apply,
            num_classes=num_classes or len(index.classes),
            mean=mean,
            std=std,
            erase_fill=augment.erase_fill,
        )
        dali_does_all = device == "cuda" or augment.auto_augment_num_ops > 0
        self._resizer = None if dali_does_all else Resizer(threads, interpolation, mean, std)
        self._current: _Run | None = None
        self._closed = False
        self._decoder, self._device_id = "mixed" if device == "cuda" else "cpu", device_id
        common = {
            "source": self._next_input,
            "batch_size": max_batch_size,
            "num_threads": threads,
            "device_id": device_id,
            "prefetch_queue_depth": 2,
        }
        if self._resizer is not None:
            self._new_pipeline = partial(_windows_pipeline, **common)
        else:
            self._new_pipeline = partial(
                _pixels_pipeline,
                decoder=self._decoder,
                auto=augment.auto_augment,
                stages=augment.auto_augment_num_ops,
                interpolation=_FILTERS[interpolation],
                mean=[255 * m for m in mean],
                std=[255 * s for s in std],
                **common,
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
        self._reader.close()
        if self._resizer is not None:
            self._resizer.close()
        self._pipeline = None

    def run(self, batches: Iterable[PlannedBatch]) -> Generator[Batch]:
        """Yields the pixels of each planned batch, in order; `batches` is asked for the next ones in a thread.

        A loader does one run at a time: a new one ends one that was left in the middle.

        Raises:
            DataError: a file is corrupt or has gone; the message names it. The loader is closed then.
        """
        if self._closed:
            raise RuntimeError("this loader is closed")
        self._drain()
        run = self._current = _Run(iter(batches))
        for _ in range(_AHEAD):
            self._load_next(run)
        outputs = self._outputs(run)
        try:
            for output in _one_ahead(outputs) if self._resizer else outputs:
                self._check_current(run)
                yield self._finished(output)
        except Exception:
            if self._current is run:
                self.close()
            raise
        finally:
            if self._current is run:
                self._drain()

    def _outputs(self, run: "_Run") -> "Iterator[_Output]":
        """What DALI makes of each batch."""
        while True:
            self._check_current(run)
            try:
                (images,) = self._pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                self._recover(run, error)
                continue
            yield self._output(images, run.in_dali.popleft().planned)

    def _check_current(self, run: "_Run") -> None:
        if self._current is not run:
            raise RuntimeError("this run has ended: its loader was closed or has begun a newer run")

    def _recover(self, run: "_Run", error: RuntimeError) -> None:
        """After DALI met something that it cannot decode: goes on without it, or with PIL's pixels, or names it."""
        corrupt, refused = self._reader.corrupt(run.samples()), set()
        if not corrupt and "fn.decoders" in str(error):
            refused = self._refused(run)
        if corrupt and not self._reader.replaces:
            raise DataError(
                "corrupt image files:\n  " + listed(list(corrupt.values()), "\n  ") + "\nReplace or remove them."
            ) from error
        if corrupt or refused:
            self.skipped.update(corrupt)
            self._reader.by_pil |= refused
            run.again.extendleft(loaded.wanted for loaded in reversed(run.in_dali))
            run.in_dali.clear()
            self._pipeline = self._new_pipeline()
            return
        if "fn.decoders" not in str(error):
            raise error
        places = [self.index.describe(sample) for sample in run.samples()]
        raise DataError(
            f"DALI cannot decode one of these images, although it can decode each alone ({_reason(error)}):\n  "
            + listed(places, "\n  ")
        ) from error

    def _refused(self, run: "_Run") -> set[int]:
        """Those of the samples in DALI that it cannot decode by themselves, although PIL can."""
        found = set()
        for sample in run.samples():
            if sample in self._reader.by_pil:
                continue
            alone = _whole_pipeline(
                self.index.read(sample), self._decoder, batch_size=1, num_threads=1, device_id=self._device_id
            )
            try:
                alone.run()
            except RuntimeError:
                found.add(sample)
        return found

    def _load_next(self, run: "_Run") -> None:
        run.ahead.append(self._planner.submit(self._load, run.batches))

    def _load(self, batches: Iterator[PlannedBatch]) -> ReadBatch | None:
        """Plans and reads the next batch (in the planner's thread); None after the last one."""
        planned = next(batches, None)
        return None if planned is None else self._reader.read(planned)

    def _next_input(self) -> tuple[Any, ...]:
        """DALI's request for the next batch."""
        run = self._current
        if run is None:
            raise StopIteration
        if run.again:
            loaded: ReadBatch | None = self._reader.read(run.again.popleft())
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
        return loaded.windows() if self._resizer is not None else loaded.windows() + loaded.pixels() + loaded.auto()

    def _output(self, images: Any, planned: PlannedBatch) -> "_Output":
        labels_N = self._labels_N[planned.ids_B].to(self.device, non_blocking=True)
        if self._resizer is not None:
            windows = [images.at(i) for i in range(len(planned))]
            return _Output(self._resizer.submit(windows, planned).result, labels_N, planned)
        tensor = images.as_tensor()
        if self.device.type == "cpu":
            images_NCHW = torch.from_dlpack(tensor)  # without a copy: DALI's executor allocates each output anew
        else:  # a copy on the model's stream: DALI may use its memory again before the model is done with it
            images_NCHW = torch.empty(tensor.shape(), dtype=torch.float32, device=self.device)
            feed_ndarray(tensor, images_NCHW, cuda_stream=torch.cuda.current_stream(self.device))
        return _Output(lambda: images_NCHW, labels_N, planned)

    def _finished(self, output: "_Output") -> Batch:
        planned, labels_N = output.planned, output.labels_N
        images_NCHW, targets = self._augmented(output.images_NCHW(), labels_N, planned.augmentations)
        if self.channels == 1:
            images_NCHW = batch_ops.gray(images_NCHW, self._std)
        return Batch(images_NCHW, labels_N, targets, planned.ids_B)

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
        except (
            RuntimeError,
            DataError,
        ):  # corruption beyond where the run was left: it is named by a run that asks for it
            self._pipeline = self._new_pipeline()
        self._current = None


@dataclass(frozen=True)
class _Output:
    """A batch whose images may still be in the making."""

    images_NCHW: Callable[[], torch.Tensor]
    labels_N: torch.Tensor
    planned: PlannedBatch


def _one_ahead(outputs: Iterator[_Output]) -> Iterator[_Output]:
    """Each output after the next one has been begun, so that threads have work while the caller has the last one."""
    ahead = next(outputs, None)
    while ahead is not None:
        current, problem = ahead, None
        try:
            ahead = next(outputs, None)
        except Exception as error:
            ahead, problem = None, error  # told when it is asked for
        yield current
        if problem is not None:
            raise problem


@dataclass
class _Run:
    """What is under way: the plan, batches that are being read, those that DALI holds, those that it must get again."""

    batches: Iterator[PlannedBatch]
    ahead: deque[Future[ReadBatch | None]] = field(default_factory=deque)
    in_dali: deque[ReadBatch] = field(default_factory=deque)
    again: deque[PlannedBatch] = field(default_factory=deque)

    def samples(self) -> list[int]:
        """Those that DALI holds."""
        return sorted({int(sample) for loaded in self.in_dali for sample in loaded.planned.ids_B})


_WINDOWS = [(types.UINT8, 1), (types.INT32, 1), (types.INT32, 1)]  # types and dimensions of `ReadBatch.windows`
_PIXELS = [(types.FLOAT, 1), (types.FLOAT, 1), (types.INT32, 1), (types.INT32, 0)]
_AUTO = [(types.INT32, 1)] * 3


def _inputs(source: Any, kinds: list[tuple[Any, int]]) -> Any:
    return fn.external_source(
        source=source, num_outputs=len(kinds), dtype=[kind for kind, _ in kinds], ndim=[ndim for _, ndim in kinds]
    )


def _decoded(encoded: Any, start: Any, shape: Any, decoder: str) -> Any:
    """Windows of images, bit-identical to PIL's on the CPU; EXIF orientation is not applied, as in torchvision."""
    return fn.decoders.image_slice(
        encoded,
        device=decoder,
        start=start,
        shape=shape,
        axis_names="HW",
        output_type=types.RGB,
        adjust_orientation=False,
        use_fast_idct=False,
        jpeg_fancy_upsampling=True,  # chroma as libjpeg and PIL make it; the CPU's decoder does so anyway
    )


def _reason(error: RuntimeError) -> str:
    """The line of DALI's message that says what is wrong."""
    return next(filter(str.strip, str(error).partition("encountered:")[2].splitlines()), str(error))


@pipeline_def
def _whole_pipeline(encoded: NDArray[np.uint8], decoder: str) -> Any:
    """One image, whole, by itself."""
    source = fn.external_source(source=lambda: [encoded], dtype=types.UINT8, ndim=1)
    return fn.decoders.image(source, device=decoder, output_type=types.RGB, use_fast_idct=False)


@pipeline_def
def _windows_pipeline(source: Any) -> Any:
    """On the CPU DALI only decodes; see `pipeline.data.resize` for the rest."""
    encoded, start, shape = _inputs(source, _WINDOWS)
    return _decoded(encoded, start, shape, "cpu")


@pipeline_def(enable_conditionals=True)
def _pixels_pipeline(
    source: Any, decoder: str, interpolation: Any, mean: list[float], std: list[float], auto: str, stages: int
) -> Any:
    """On the GPU, or where it augments, DALI does all: decode a window, resize a region, augment, mirror, normalize."""
    inputs = _inputs(source, _WINDOWS + _PIXELS + (_AUTO if stages else []))
    encoded, start, shape, region_start, region_end, side, flip = inputs[:7]
    images = _decoded(encoded, start, shape, decoder)
    images = fn.resize(
        images,
        size=fn.cast(side, dtype=types.FLOAT),
        roi_start=region_start,
        roi_end=region_end,
        interp_type=interpolation,
        antialias=True,
    )
    if stages:
        ops, bins, signs = inputs[7:]
        images = augmented(images, ops, bins, signs, side, auto, stages)
    return fn.crop_mirror_normalize(images, mirror=flip, mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW")
