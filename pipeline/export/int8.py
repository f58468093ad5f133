"""Post-training int8 quantization: calibration, and accuracy and speed compared with fp32 on a data set."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.data.dali import Loader
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, rank_eval_batches
from pipeline.evaluation.labels import map_labels
from pipeline.evaluation.probabilities import probabilities
from pipeline.evaluation.scores import best_class
from pipeline.export.formats import OnnxModel, to_int8, to_onnx
from pipeline.model.card import ModelCard

_BATCH = 32


@dataclass(frozen=True)
class OnnxResult:
    """Accuracy, speed and size of an ONNX file.

    `img_per_s` is measured on this machine with one decoding thread; `bytes` is the file size.
    """

    file: str
    top1_correct: int
    total: int
    img_per_s: float
    bytes: int

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.top1_correct / self.total


def quantize(
    model: nn.Module, card: ModelCard, out: Path, calibration: DatasetIndex, index: DatasetIndex, images: int
) -> tuple[OnnxResult, OnnxResult]:
    """Writes `out/model.onnx` and `out/model.int8.onnx`; evaluates both on all images of `index`.

    The activation ranges of the int8 file come from `images` images of `calibration`.

    Raises:
        DataError: The model does not know a class of the data.
        TrainingError: The logits of the fp32 file differ from torch's.
    """
    labels_N = map_labels(index, card.classes)
    fp32 = to_onnx(model, card, out)
    int8 = to_int8(fp32, out, _calibration_batches(calibration, card, images))
    return _measure(fp32, card, index, labels_N), _measure(int8, card, index, labels_N)


def _measure(file: Path, card: ModelCard, index: DatasetIndex, labels_N: NDArray[np.int64]) -> OnnxResult:
    started = time.perf_counter()
    probabilities_NK, _ = probabilities(
        OnnxModel(file),
        index,
        card.transform,
        views=None,
        device="cpu",
        channels=card.in_chans,
        threads=1,
        batch_size=_BATCH,
    )
    correct = int((best_class(probabilities_NK) == labels_N).sum())
    img_per_s = len(index) / (time.perf_counter() - started)
    return OnnxResult(str(file), correct, len(index), img_per_s, file.stat().st_size)


def _calibration_batches(
    index: DatasetIndex, card: ModelCard, images: int
) -> Callable[[], Iterator[NDArray[np.float32]]]:
    """Returns a function that yields batches of evenly spaced images after the card's evaluation transform."""
    rows_N = np.unique(np.linspace(0, len(index) - 1, min(images, len(index))).astype(np.int64))
    subset, transform = index.subset(rows_N), card.transform

    def batches() -> Iterator[NDArray[np.float32]]:
        with Loader(
            subset,
            device="cpu",
            device_id=None,
            threads=1,
            max_batch_size=_BATCH,
            interpolation=transform.interpolation,
            mean=transform.mean,
            std=transform.std,
            channels=card.in_chans,
        ) as loader:
            plan = EvalPlan(subset.widths_N, subset.heights_N, transform.resize, transform.crop)
            for batch in loader.run(plan.batch(ids_B) for ids_B in rank_eval_batches(len(subset), 0, 1, _BATCH)):
                yield batch.images_NCHW.numpy()

    return batches
