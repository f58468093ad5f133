"""Predictions: of some images by the code that is packaged with models, of many by DALI into a table."""

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

from pipeline.data.folders import scan_images
from pipeline.data.images import NotAnImage, decode
from pipeline.data.index import DatasetIndex
from pipeline.errors import DataError, UserError
from pipeline.evaluation.probabilities import card_probabilities
from pipeline.evaluation.scores import NO_CLASS, best_class
from pipeline.files import atomic_file
from pipeline.model.card import ModelCard

_NON_FINITE = "NaN or infinities"
_CHUNK = 8192  # images whose probabilities are held at a time
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
    """An image's most probable classes with their probabilities in [0, 1], best first.

    `image` is its path, or says which one it is of those that were given without.
    """

    image: str
    classes: dict[str, float]

    @property
    def best(self) -> str:
        """The most probable class."""
        return next(iter(self.classes))


@dataclass(frozen=True)
class FolderPredictions:
    """What came of a folder: images classified, files that are no valid images, images per second in all.

    `out` is the table. `non_finite` counts the images for which the model gives NaN or infinities, which have no
    class; `ignored` are lines on the hidden files.
    """

    out: str
    classified: int
    corrupt: int
    non_finite: int
    img_per_s: float
    ignored: list[str]


class Predictor:
    """A model as it is packaged, which takes a few images at once; `model` names it in errors."""

    def __init__(self, card: ModelCard, weights: dict[str, torch.Tensor], model: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's advice on type hints
            from pipeline.export.pyfunc_model import Classifier

        self._name, self._classifier = model, Classifier()
        self._classifier.load(asdict(card), weights)

    def predict(self, images: Sequence[ImageInput], topk: int) -> list[Prediction]:
        """The `topk` most probable classes of each image.

        Raises:
            UserError: a file is missing or is not an image, or the model gives NaN or infinities for it.
        """
        named = [_named(image, place) for place, image in enumerate(images)]
        try:
            rows = self._probabilities([value for _, value in named])
        except MlflowException:  # one by one, to tell which it is
            rows = [self._one(name, value) for name, value in named]
        classes = self._classifier.classes
        return [
            Prediction(name, {classes[k]: float(row_K[k]) for k in _best(row_K, topk)})
            for (name, _), row_K in zip(named, rows, strict=True)
        ]

    def _one(self, name: str, value: object) -> NDArray[np.float64]:
        try:
            return self._probabilities([value])[0]
        except MlflowException as error:
            if error.error_code == "INTERNAL_ERROR":
                raise UserError(f"{name}: the model in {self._name} gives {_NON_FINITE}: it cannot be used.") from error
            reason = str(error.__cause__).replace("is not an image", "is not an image that can be read")
            raise UserError(f"{name} {reason}.") from error

    def _probabilities(self, values: list[object]) -> list[NDArray[np.float64]]:
        return list(self._classifier.predict(None, pd.DataFrame({"image": values}))["probabilities"])


def _named(image: ImageInput, place: int) -> tuple[str, object]:
    """What an image is called in results and errors, and what the packaged model is given."""
    if not isinstance(image, str | Path):
        return f"image {place}", image
    path = Path(image)
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give image files, or a folder with --batch.")
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
    """Classifies all files below `images` with a model, by the loader that evaluation uses.

    Writes a Parquet file with a row for each: `image` (its path below `images`), the best class, the `topk` best
    ones, or what is wrong with the file, or that the model gives NaN for it, in `error`. `progress` is told how many of
    how many are done.

    Raises:
        UserError: there are no files, or `out` cannot be written.
    """
    index, problems, ignored = scan_images(images, card.max_pixels)
    if not len(index) and not problems:
        raise DataError(f"{images} holds no files: give a folder with images.")
    started, classified, non_finite, total = time.perf_counter(), 0, 0, len(index)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as aside, pq.ParquetWriter(aside, _SCHEMA, compression="zstd") as writer:
            for start in range(0, total, _CHUNK):
                part = index.subset(np.arange(start, min(start + _CHUNK, total)))
                told = _progress_from(progress, start, total)
                try:
                    given_NK = _given(model, card, part, batch_size, told)
                except DataError:  # corruption that only a whole decoding shows: found one by one
                    valid, unsound = _looked_through(part)
                    problems |= unsound
                    part = part.subset(valid)
                    given_NK = _given(model, card, part, batch_size, _progress_from(progress, start, total))
                none = int((best_class(given_NK) == NO_CLASS).sum())
                classified, non_finite = classified + len(part) - none, non_finite + none
                writer.write_table(_table(part, given_NK, card.classes, topk))
            rows = [{"image": name, "error": reason} for name, reason in sorted(problems.items())]
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}.") from error
    img_per_s = (classified + non_finite) / (time.perf_counter() - started)
    return FolderPredictions(str(out), classified, len(problems), non_finite, img_per_s, ignored.lines())


def _progress_from(progress: Callable[[int, int], None], start: int, total: int) -> Callable[[int], None]:
    """Turns numbers of images just done, from `start` on, into how many of `total` are done."""
    done = start

    def told(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    return told


def _given(
    model: nn.Module, card: ModelCard, index: DatasetIndex, batch_size: int, told: Callable[[int], None]
) -> NDArray[np.float32]:
    if not len(index):
        return np.zeros((0, card.num_classes), np.float32)
    return card_probabilities(model, card, index, batch_size=batch_size, progress=told)[0]


def _looked_through(index: DatasetIndex) -> tuple[NDArray[np.int64], dict[str, str]]:
    """Decodes each image: the places of valid ones, and what is wrong with the others by name."""
    valid, problems = [], {}
    for i in range(len(index)):
        try:
            decode(index.read(i).tobytes(), int(index.widths_N[i] * index.heights_N[i]))
            valid.append(i)
        except (NotAnImage, DataError) as error:  # the latter also of a file that has gone meanwhile
            problems[_name(index, i)] = str(error)
    return np.array(valid, np.int64), problems


def _table(index: DatasetIndex, given_NK: NDArray[np.float32], classes: Sequence[str], top: int) -> pa.Table:
    order_NK = np.argsort(-given_NK, axis=1, kind="stable")[:, :top]
    probabilities_NK = np.take_along_axis(given_NK, order_NK, axis=1)
    best_N = best_class(given_NK).tolist()
    given = [best != NO_CLASS for best in best_N]

    def known(values: Iterable[Any]) -> list[Any]:
        return [value if there else None for value, there in zip(values, given, strict=True)]

    columns = {
        "image": [_name(index, i) for i in range(len(index))],
        "class_id": known(best_N),
        "class_name": known(classes[k] for k in best_N),
        "probability": known(probabilities_NK[:, 0]),
        "top_class_ids": known(order_NK),
        "top_probabilities": known(probabilities_NK),
        "error": [None if there else f"the model gives {_NON_FINITE}" for there in given],
    }
    return pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in _SCHEMA], schema=_SCHEMA)


def _name(index: DatasetIndex, sample: int) -> str:
    return index.path(sample).relative_to(index.root).as_posix()


def _best(row_K: NDArray[np.float64], top: int) -> list[int]:
    return np.argsort(-row_K, kind="stable")[:top].tolist()
