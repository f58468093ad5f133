"""Prediction: single images with the code of packaged models, folders with DALI into a Parquet table."""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray
from torch import nn

from pipeline.data.folder_index import scan_images
from pipeline.data.images import NotAnImage, decode
from pipeline.data.index import DatasetIndex
from pipeline.errors import DataError, UserError
from pipeline.evaluation.probabilities import card_probabilities
from pipeline.evaluation.scores import NO_CLASS, best_class
from pipeline.files import atomic_file
from pipeline.model.card import ModelCard

_NON_FINITE = "NaN or infinities"
_CHUNK = 8192  # images whose probabilities are in memory at once
_SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("probability", pa.float32()),
        ("top_class_ids", pa.list_(pa.int32())),
        ("top_probabilities", pa.list_(pa.float32())),
        ("error", pa.string()),
    ]
)


ImageInput = str | Path | bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image with their probabilities in [0, 1], best first.

    `image` is its path, or `image N` with its index for inputs without a path.
    """

    image: str
    classes: dict[str, float]

    @property
    def best(self) -> str:
        """The most probable class."""
        return next(iter(self.classes))


@dataclass(frozen=True)
class FolderPredictions:
    """Summary of a folder prediction.

    Attributes:
        out: The Parquet file.
        classified: Images with a predicted class.
        corrupt: Files that are not valid images.
        non_finite: Images with NaN or infinite outputs; they have no predicted class.
        img_per_s: Overall throughput, images per second.
        ignored: Messages about ignored hidden files.
    """

    out: str
    classified: int
    corrupt: int
    non_finite: int
    img_per_s: float
    ignored: list[str]


class Predictor:
    """Predicts single images with the code of the packaged model; `model` is its name in error messages."""

    def __init__(self, card: ModelCard, weights: dict[str, torch.Tensor], model: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's advice on type hints
            from pipeline.export.pyfunc_model import Classifier

        self._name, self._classifier = model, Classifier()
        self._classifier.load(asdict(card), weights)

    def predict(self, images: Sequence[ImageInput], topk: int) -> list[Prediction]:
        """Returns the `topk` most probable classes of each image.

        Raises:
            UserError: A file is missing or is not an image, or the model outputs NaN or infinities for it.
        """
        inputs = [_name_and_value(image, i) for i, image in enumerate(images)]
        try:
            rows = self._probabilities([value for _, value in inputs])
        except MlflowException:  # one by one, to find the image that fails
            rows = [self._predict_one(name, value) for name, value in inputs]
        classes = self._classifier.classes
        return [
            Prediction(name, {classes[k]: float(row_K[k]) for k in _best(row_K, topk)})
            for (name, _), row_K in zip(inputs, rows, strict=True)
        ]

    def _predict_one(self, name: str, value: object) -> NDArray[np.float64]:
        try:
            return self._probabilities([value])[0]
        except MlflowException as error:
            if error.error_code == "INTERNAL_ERROR":
                raise UserError(
                    f"{name}: the model in {self._name} outputs {_NON_FINITE}: it cannot be used."
                ) from error
            reason = str(error.__cause__).replace("is not an image", "is not an image that can be read")
            raise UserError(f"{name} {reason}.") from error

    def _probabilities(self, values: list[object]) -> list[NDArray[np.float64]]:
        return list(self._classifier.predict(None, pd.DataFrame({"image": values}))["probabilities"])


def _name_and_value(image: ImageInput, index: int) -> tuple[str, object]:
    """Returns the name of an image in results and errors, and the input for the packaged model."""
    if not isinstance(image, str | Path):
        return f"image {index}", image
    path = Path(image)
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if not path.is_file():
        raise UserError(f"{path} is not a file: pass image files, or a folder with --batch.")
    return str(path), path


def predict_folder(
    model: nn.Module,
    card: ModelCard,
    images: Path,
    out: Path,
    *,
    topk: int = 5,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FolderPredictions:
    """Classifies all files in the folder tree `images`, with the data loader of evaluation.

    Writes a Parquet file with one row per file: `image` (path relative to `images`), the best class, the `topk` best
    classes; or the problem of the file, or NaN outputs, in `error`. `progress` receives the number of classified images
    and the total.

    Raises:
        UserError: There are no files, or `out` cannot be written.
    """
    index, problems, ignored = scan_images(images, card.max_pixels)
    if not len(index) and not problems:
        raise DataError(f"{images} contains no files: pass a folder with images.")
    started, classified, non_finite, total = time.perf_counter(), 0, 0, len(index)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as temporary, pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
            for start in range(0, total, _CHUNK):
                part = index.subset(np.arange(start, min(start + _CHUNK, total)))
                report = _progress_from(progress, start, total)
                try:
                    probabilities_NK = _probabilities(model, card, part, batch_size, report)
                except DataError:  # corruption that only complete decoding detects: check images one by one
                    valid, corrupt = _find_corrupt(part)
                    problems |= corrupt
                    part = part.subset(valid)
                    report = _progress_from(progress, start, total)
                    probabilities_NK = _probabilities(model, card, part, batch_size, report)
                without_class = int((best_class(probabilities_NK) == NO_CLASS).sum())
                classified, non_finite = classified + len(part) - without_class, non_finite + without_class
                writer.write_table(_table(part, probabilities_NK, card.classes, topk))
            rows = [{"image": name, "error": reason} for name, reason in sorted(problems.items())]
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}.") from error
    img_per_s = (classified + non_finite) / (time.perf_counter() - started)
    return FolderPredictions(str(out), classified, len(problems), non_finite, img_per_s, ignored.lines())


def _progress_from(progress: Callable[[int, int], None], start: int, total: int) -> Callable[[int], None]:
    """Returns a function that adds batch sizes to `start` and reports the sum with `total` to `progress`."""
    done = start

    def report(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    return report


def _probabilities(
    model: nn.Module, card: ModelCard, index: DatasetIndex, batch_size: int, report: Callable[[int], None]
) -> NDArray[np.float32]:
    if not len(index):
        return np.zeros((0, card.num_classes), np.float32)
    return card_probabilities(model, card, index, batch_size=batch_size, progress=report)[0]


def _find_corrupt(index: DatasetIndex) -> tuple[NDArray[np.int64], dict[str, str]]:
    """Decodes each image; returns the indices of valid images, and the problems of the others by name."""
    valid, problems = [], {}
    for i in range(len(index)):
        try:
            decode(index.read(i).tobytes(), int(index.widths_N[i]) * int(index.heights_N[i]))
            valid.append(i)
        except (NotAnImage, DataError) as error:  # `DataError`: for example a file that was deleted meanwhile
            problems[_name(index, i)] = str(error)
    return np.array(valid, np.int64), problems


def _table(index: DatasetIndex, probabilities_NK: NDArray[np.float32], classes: Sequence[str], top: int) -> pa.Table:
    order_NK = np.argsort(-probabilities_NK, axis=1, kind="stable")[:, :top]
    top_NK = np.take_along_axis(probabilities_NK, order_NK, axis=1)
    best_N = best_class(probabilities_NK).tolist()
    finite = [best != NO_CLASS for best in best_N]

    def if_finite(values: Iterable[Any]) -> list[Any]:
        return [value if is_finite else None for value, is_finite in zip(values, finite, strict=True)]

    columns = {
        "image": [_name(index, i) for i in range(len(index))],
        "class_id": if_finite(best_N),
        "class_name": if_finite(classes[k] for k in best_N),
        "probability": if_finite(top_NK[:, 0]),
        "top_class_ids": if_finite(order_NK),
        "top_probabilities": if_finite(top_NK),
        "error": [None if is_finite else f"the model outputs {_NON_FINITE}" for is_finite in finite],
    }
    return pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in _SCHEMA], schema=_SCHEMA)


def _name(index: DatasetIndex, sample: int) -> str:
    return index.path(sample).relative_to(index.root).as_posix()


def _best(row_K: NDArray[np.float64], top: int) -> list[int]:
    return np.argsort(-row_K, kind="stable")[:top].tolist()
