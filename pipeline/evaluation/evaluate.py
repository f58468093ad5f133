"""Evaluates a model on a split: exact accuracy counts, per-class accuracy, confusion matrix, predictions."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.config_fields import Interpolation
from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.evaluation.labels import map_labels, read_label_sets
from pipeline.evaluation.probabilities import VIEWS, card_probabilities
from pipeline.evaluation.scores import NO_CLASS, Scores, best_class, confusion, score, score_sets
from pipeline.evaluation.tables import write_confusion, write_csv, write_json
from pipeline.model.card import ModelCard, Transform

PLAIN, LABELS = "plain", "labels"  # keys of `Evaluation.scores`, next to the name of the test-time augmentation


@dataclass(frozen=True)
class LabelScores:
    """Correct predictions by the labels of a file; `total` counts the images that have a label in it."""

    file: str
    top1_correct: int
    total: int


@dataclass(frozen=True)
class Evaluation:
    """Result of evaluating a model on a split, each image once.

    `scores` has the keys `plain`, the name of the test-time augmentation if one was requested, and `labels` if a labels
    file was passed. The properties return the values of `plain`. `fingerprint` identifies the data, `transform`
    describes the evaluation transform in one line.
    """

    model: str
    data: str
    split: str
    fingerprint: str
    transform: str
    scores: dict[str, Scores | LabelScores]

    @property
    def plain(self) -> Scores:
        """Scores of a single center crop per image, without test-time augmentation."""
        scores = self.scores[PLAIN]
        assert isinstance(scores, Scores)
        return scores

    @property
    def total(self) -> int:
        """Number of images."""
        return self.plain.total

    @property
    def top1_correct(self) -> int:
        """Images whose label is the most probable class."""
        return self.plain.top1_correct

    @property
    def top5_correct(self) -> int:
        """Images whose label is among the `plain.top5_k` most probable classes."""
        return self.plain.top5_correct

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return self.plain.top1

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent."""
        return self.plain.top5

    @property
    def loss(self) -> float | None:
        """Mean cross-entropy over the images with finite outputs; None if there are none."""
        return self.plain.loss


def evaluate(
    model: nn.Module,
    card: ModelCard,
    index: DatasetIndex,
    transform: Transform,
    *,
    name: str,
    data: str,
    split: str,
    tta: str | None = None,
    labels: Path | None = None,
    out: Path | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluates a model on all images of an index.

    Args:
        model: The torch module.
        card: Its model card.
        index: The images.
        transform: The evaluation transform.
        name: Name of the model in the result.
        data: Name of the data set in the result.
        split: Name of the split in the result.
        tta: As in `TrainedModel.evaluate`, like the arguments after it.

    Raises:
        DataError: The model does not know a class of the data, or the labels file does not match the images.
        UserError: `out` cannot be written.
    """
    labels_N = map_labels(index, card.classes)
    sets = None if labels is None else read_label_sets(labels, index, card.num_classes)
    total = len(index) * (len(VIEWS[tta]) if tta else 1)
    done = 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    plain_NK, averaged_NK = card_probabilities(
        model, card, index, transform, views=tta, batch_size=batch_size, progress=count
    )
    scores: dict[str, Scores | LabelScores] = {PLAIN: score(plain_NK, labels_N)}
    if averaged_NK is not None:
        scores[str(tta)] = score(averaged_NK, labels_N)
    if sets is not None:
        scores[LABELS] = LabelScores(str(labels), *score_sets(plain_NK, sets))
    evaluation = Evaluation(name, data, split, index.fingerprint, transform.description, scores)
    if out is not None:
        _write(out, index, card.classes, plain_NK, labels_N, asdict(evaluation))
    return evaluation


def override_transform(
    card: ModelCard, crop: int | None, resize: int | None, interpolation: Interpolation | None, tta: str | None
) -> Transform:
    """Returns the card's transform with the requested changes; checks `tta` too.

    Raises:
        UserError: A value is unknown, or the crop is larger than the resized image.
    """
    if tta is not None and tta not in VIEWS:
        raise UserError(f"--tta={tta} is not known: use {' or '.join(VIEWS)}.")
    if interpolation not in (None, "bilinear", "bicubic"):
        raise UserError(f"--interpolation={interpolation} is not known: use bilinear or bicubic.")
    transform = card.transform.override(crop, resize, interpolation)
    if transform.crop > transform.resize:
        raise UserError(f"--crop={transform.crop} must not exceed --resize={transform.resize}.")
    return transform


def _write(
    out: Path,
    index: DatasetIndex,
    classes: Sequence[str],
    plain_NK: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    report: dict[str, Any],
) -> None:
    """Writes scores as JSON; per-class accuracy, confusion matrix and predictions as CSV."""
    best_N = best_class(plain_NK)
    matrix_KK = confusion(best_N, labels_N, len(classes))
    totals_K, correct_K = np.bincount(labels_N, minlength=len(classes)).tolist(), matrix_KK.diagonal().tolist()
    per_class = [
        [name, total, correct, f"{correct / total:.6f}" if total else ""]
        for name, total, correct in zip(classes, totals_K, correct_K, strict=True)
    ]
    names = index.names()
    images = []
    for name, label, best, row in zip(names, labels_N, best_N, plain_NK, strict=True):
        prediction = ["", "", ""] if best == NO_CLASS else [classes[best], f"{row[best]:.6f}", f"{row[label]:.6f}"]
        images.append([name, classes[label], *prediction])
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "per_class.csv", ["class", "images", "top1_correct", "top1"], per_class)
        write_confusion(out / "confusion.csv", classes, matrix_KK)
        write_csv(out / "predictions.csv", ["image", "class", "predicted", "probability", "of_class"], images)
        write_json(out / "scores.json", report)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}.") from error
