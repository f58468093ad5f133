"""The data loader: DALI decodes, resizes and normalizes planned batches. Only it and `auto_augment` use DALI."""

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

from pipeline.config_data import Augment
from pipeline.config_fields import Device, Interpolation, Rgb
from pipeline.data import batch_ops
from pipeline.data.auto_augment import apply_auto_augment
from pipeline.data.index import DatasetIndex
from pipeline.data.philox import Ints
from pipeline.data.plan import PlannedBatch, TrainPlan
from pipeline.data.reading import ReadBatch, Reader
from pipeline.data.resize import Resizer
from pipeline.errors import DataError, listed
from pipeline.host_memory import keep_freed_memory

_PREFETCH = 2  # batches read ahead of DALI, which prefetches as many more
_FILTERS = {"bilinear": types.INTERP_TRIANGULAR, "bicubic": types.INTERP_CUBIC}


@dataclass(frozen=True)
class Batch:
    """Images ready for the model, on its device.

    `images_NCHW` is normalized fp32 (RGB, or luma only), `labels_N` int64, `ids_N` the samples' rows in the index.
    `targets` are the labels; with mixup or CutMix they are soft targets (fp32, [N, classes]).
    """

    images_NCHW: torch.Tensor
    labels_N: torch.Tensor
    targets: torch.Tensor
    ids_N: Ints


class Loader:
    """Loads planned batches; use it as a context manager, or call `close`.

    `readers` threads prefetch files (0: the planning thread reads) and DALI's threads prefetch decoded images, so the
    caller waits only if loading is slower than the caller. The only state between two calls of `run` is which samples
    are corrupt and which DALI cannot decode. With `replacement_plan`, the plan of the batches, corrupt samples are
    replaced and listed in `skipped` (see `pipeline.data.reading`); without it they are errors. `num_classes` is the
    number of classes in soft targets; default: the index's.
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
        replacement_plan: TrainPlan | None = None,
        channels: Literal[1, 3] = 3,
        num_classes: int | None = None,
    ) -> None:
        if device == "cpu":
            keep_freed_memory()
        augment = augment or Augment()
        self.index = index
        self.device = torch.device(device) if device_id is None else torch.device(device, device_id)
        self.channels = channels
        self._planner = ThreadPoolExecutor(1, "plan")
        self._reader = Reader(index, readers, replacement_plan)
        self.skipped = self._reader.skipped
        self._std = std
        self._augment = partial(
            batch_ops.apply,
            num_classes=num_classes or len(index.classes),
            mean=mean,
            std=std,
            erase_fill=augment.erase_fill,
        )
        dali_resizes = device == "cuda" or augment.auto_augment_num_ops > 0
        self._resizer = None if dali_resizes else Resizer(threads, interpolation, mean, std)
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
            self._new_pipeline = partial(_decode_pipeline, **common)
        else:
            self._new_pipeline = partial(
                _full_pipeline,
                decoder=self._decoder,
                auto_augment=augment.auto_augment,
                num_ops=augment.auto_augment_num_ops,
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
        """Stops the threads and frees DALI's memory; the loader cannot be used again."""
        self._closed = True
        self._current = None
        self._planner.shutdown(cancel_futures=True)
        self._reader.close()
        if self._resizer is not None:
            self._resizer.close()
        self._pipeline = None

    def run(self, batches: Iterable[PlannedBatch]) -> Generator[Batch]:
        """Yields each planned batch, loaded, in order; a background thread iterates over `batches`.

        A loader has one run at a time: a new run ends an unfinished one.

        Raises:
            DataError: a file is corrupt or missing; the message names it. The loader is closed then.
        """
        if self._closed:
            raise RuntimeError("this loader is closed")
        self._drain()
        run = self._current = _Run(iter(batches))
        for _ in range(_PREFETCH):
            self._load_next(run)
        outputs = self._outputs(run)
        try:
            for output in _prefetch_one(outputs) if self._resizer else outputs:
                self._check_current(run)
                yield self._finish(output)
        except Exception:
            if self._current is run:
                self.close()
            raise
        finally:
            if self._current is run:
                self._drain()

    def _outputs(self, run: "_Run") -> "Iterator[_Output]":
        """Yields DALI's output for each batch."""
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
            raise RuntimeError("this run has ended: its loader was closed or has started a newer run")

    def _recover(self, run: "_Run", error: RuntimeError) -> None:
        """Handles DALI's error: replaces corrupt samples, decodes others with PIL, or raises a `DataError`."""
        corrupt, undecodable = self._reader.corrupt(run.samples()), set()
        if not corrupt and "fn.decoders" in str(error):
            undecodable = self._undecodable(run)
        if corrupt and not self._reader.replaces:
            raise DataError(
                "corrupt image files:\n  " + listed(list(corrupt.values()), "\n  ") + "\nReplace or remove them."
            ) from error
        if corrupt or undecodable:
            self.skipped.update(corrupt)
            self._reader.pil_samples |= undecodable
            run.retry.extendleft(loaded.requested for loaded in reversed(run.in_dali))
            run.in_dali.clear()
            self._pipeline = self._new_pipeline()
            return
        if "fn.decoders" not in str(error):
            raise error
        samples = [self.index.describe(sample) for sample in run.samples()]
        raise DataError(
            f"DALI cannot decode one of these images, although it can decode each alone ({_reason(error)}):\n  "
            + listed(samples, "\n  ")
        ) from error

    def _undecodable(self, run: "_Run") -> set[int]:
        """Returns the samples in DALI that DALI alone cannot decode, although PIL can."""
        found = set()
        for sample in run.samples():
            if sample in self._reader.pil_samples:
                continue
            single = _single_image_pipeline(
                self.index.read(sample), self._decoder, batch_size=1, num_threads=1, device_id=self._device_id
            )
            try:
                single.run()
            except RuntimeError:
                found.add(sample)
        return found

    def _load_next(self, run: "_Run") -> None:
        run.prefetched.append(self._planner.submit(self._load, run.batches))

    def _load(self, batches: Iterator[PlannedBatch]) -> ReadBatch | None:
        """Plans and reads the next batch (in the planning thread); returns None after the last one."""
        planned = next(batches, None)
        return None if planned is None else self._reader.read(planned)

    def _next_input(self) -> tuple[Any, ...]:
        """Returns the next batch to DALI (the callback of its external source)."""
        run = self._current
        if run is None:
            raise StopIteration
        if run.retry:
            loaded: ReadBatch | None = self._reader.read(run.retry.popleft())
        elif not run.prefetched:
            raise StopIteration
        else:
            loaded = run.prefetched.popleft().result()
            if loaded is None:
                run.prefetched.clear()
                raise StopIteration
            self._load_next(run)
        assert loaded is not None
        run.in_dali.append(loaded)
        if self._resizer is not None:
            return loaded.decode_inputs()
        return loaded.decode_inputs() + loaded.resize_inputs() + loaded.auto_augment_inputs()

    def _output(self, images: Any, planned: PlannedBatch) -> "_Output":
        labels_N = torch.from_numpy(self.index.labels_N[planned.ids_B].astype(np.int64))
        labels_N = labels_N.to(self.device, non_blocking=True)
        if self._resizer is not None:
            windows = [images.at(i) for i in range(len(planned))]
            return _Output(self._resizer.submit(windows, planned).result, labels_N, planned)
        tensor = images.as_tensor()
        if self.device.type == "cpu":
            images_NCHW = torch.from_dlpack(tensor)  # zero-copy: DALI's executor allocates a new buffer for each output
        else:  # copied on the model's stream: DALI may reuse its buffer before the model is done with it
            images_NCHW = torch.empty(tensor.shape(), dtype=torch.float32, device=self.device)
            feed_ndarray(tensor, images_NCHW, cuda_stream=torch.cuda.current_stream(self.device))
        return _Output(lambda: images_NCHW, labels_N, planned)

    def _finish(self, output: "_Output") -> Batch:
        planned, labels_N = output.planned, output.labels_N
        images_NCHW, targets = self._augment(output.images_NCHW(), labels_N, planned.augmentations)
        if self.channels == 1:
            images_NCHW = batch_ops.gray(images_NCHW, self._std)
        return Batch(images_NCHW, labels_N, targets, planned.ids_B)

    def _drain(self) -> None:
        """Resets the pipeline, also after an unfinished run."""
        if self._current is None:
            return
        for future in self._current.prefetched:
            future.cancel()
        self._current.prefetched.clear()
        self._current.retry.clear()
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except (RuntimeError, DataError):  # a corrupt sample past the run's end: the run that needs it reports it
            self._pipeline = self._new_pipeline()
        self._current = None


@dataclass(frozen=True)
class _Output:
    """A batch whose images may still be in progress."""

    images_NCHW: Callable[[], torch.Tensor]
    labels_N: torch.Tensor
    planned: PlannedBatch


def _prefetch_one(outputs: Iterator[_Output]) -> Iterator[_Output]:
    """Yields each output after starting the next one, so that the threads work while the caller uses the output."""
    following = next(outputs, None)
    while following is not None:
        current, deferred = following, None
        try:
            following = next(outputs, None)
        except Exception as error:
            following, deferred = None, error  # raised when the caller requests the next output
        yield current
        if deferred is not None:
            raise deferred


@dataclass
class _Run:
    """A run's state: planned batches, batches being read ahead, batches in DALI, and batches to retry."""

    batches: Iterator[PlannedBatch]
    prefetched: deque[Future[ReadBatch | None]] = field(default_factory=deque)
    in_dali: deque[ReadBatch] = field(default_factory=deque)
    retry: deque[PlannedBatch] = field(default_factory=deque)

    def samples(self) -> list[int]:
        """Returns the samples that are in DALI."""
        return sorted({int(sample) for loaded in self.in_dali for sample in loaded.planned.ids_B})


_DECODE = [(types.UINT8, 1), (types.INT32, 1), (types.INT32, 1)]  # dtypes and ndims of `ReadBatch.decode_inputs`
_RESIZE = [(types.FLOAT, 1), (types.FLOAT, 1), (types.INT32, 1), (types.INT32, 0)]
_AUTO_AUGMENT = [(types.INT32, 1)] * 3


def _inputs(source: Any, kinds: list[tuple[Any, int]]) -> Any:
    return fn.external_source(
        source=source, num_outputs=len(kinds), dtype=[kind for kind, _ in kinds], ndim=[ndim for _, ndim in kinds]
    )


def _decoded(encoded: Any, start: Any, shape: Any, decoder: str) -> Any:
    """Decodes windows of images, bit-identical to PIL on the CPU; ignores EXIF orientation, as torchvision."""
    return fn.decoders.image_slice(
        encoded,
        device=decoder,
        start=start,
        shape=shape,
        axis_names="HW",
        output_type=types.RGB,
        adjust_orientation=False,
        use_fast_idct=False,
        jpeg_fancy_upsampling=True,  # chroma upsampling as in libjpeg and PIL; the CPU decoder always does it
    )


def _reason(error: RuntimeError) -> str:
    """Returns the line of DALI's message that names the cause."""
    return next(filter(str.strip, str(error).partition("encountered:")[2].splitlines()), str(error))


@pipeline_def
def _single_image_pipeline(encoded: NDArray[np.uint8], decoder: str) -> Any:
    """Decodes one whole image."""
    source = fn.external_source(source=lambda: [encoded], dtype=types.UINT8, ndim=1)
    return fn.decoders.image(source, device=decoder, output_type=types.RGB, use_fast_idct=False)


@pipeline_def
def _decode_pipeline(source: Any) -> Any:
    """The pipeline on the CPU: DALI only decodes, `pipeline.data.resize` does the rest."""
    encoded, start, shape = _inputs(source, _DECODE)
    return _decoded(encoded, start, shape, "cpu")


@pipeline_def(enable_conditionals=True)
def _full_pipeline(
    source: Any, decoder: str, interpolation: Any, mean: list[float], std: list[float], auto_augment: str, num_ops: int
) -> Any:
    """The pipeline on the GPU or with RandAugment or TrivialAugment: decode, resize, augment, mirror and normalize."""
    inputs = _inputs(source, _DECODE + _RESIZE + (_AUTO_AUGMENT if num_ops else []))
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
    if num_ops:
        ops, bins, signs = inputs[7:]
        images = apply_auto_augment(images, ops, bins, signs, side, auto_augment, num_ops)
    return fn.crop_mirror_normalize(images, mirror=flip, mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW")
