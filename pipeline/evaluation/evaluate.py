"""A model's accuracy on a split, by exact counts, and what lies behind it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.config import Interpolation
from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.evaluation.labels import map_labels, read_label_sets
from pipeline.evaluation.probabilities import VIEWS, card_probabilities
from pipeline.evaluation.scores import NO_CLASS, Scores, best_class, confusion, score, score_sets
from pipeline.evaluation.tables import write_confusion, write_csv, write_json
from pipeline.model.card import ModelCard, Transform

PLAIN, LABELS = "plain", "labels"  # results besides those of averaged views


@dataclass(frozen=True)
class LabelScores:
    """Hits by a file of labels, of the `total` images that have any in it."""

    file: str
    top1_correct: int
    total: int


@dataclass(frozen=True)
class Evaluation:
    """The counts of a model on a split, each image once, and what they were counted by.

    `scores` holds `plain`, the averaged views under their name, and `labels` where a file of them was given; the
    properties are those of `plain`. `fingerprint` is that of the data, `transform` the evaluation transform in a line.
    """

    model: str
    data: str
    split: str
    fingerprint: str
    transform: str
    scores: dict[str, Scores | LabelScores]

    @property
    def plain(self) -> Scores:
        """The counts of single, centered crops."""
        found = self.scores[PLAIN]
        assert isinstance(found, Scores)
        return found

    @property
    def total(self) -> int:
        """Images."""
        return self.plain.total

    @property
    def top1_correct(self) -> int:
        """Images whose most probable class is theirs."""
        return self.plain.top1_correct

    @property
    def top5_correct(self) -> int:
        """Images whose class is among the `plain.top5_k` most probable ones."""
        return self.plain.top5_correct

    @property
    def top1(self) -> float:
        """`top1_correct` in percent of `total`."""
        return self.plain.top1

    @property
    def top5(self) -> float:
        """`top5_correct` in percent of `total`."""
        return self.plain.top5

    @property
    def loss(self) -> float | None:
        """Mean cross-entropy over the images with finite outputs; None where there are none."""
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
    """Counts a model's hits on all images of an index; further arguments as in `TrainedModel.evaluate`.

    `name`, `data` and `split` are what the model and the images are called in the result.

    Raises:
        DataError: the model does not know the classes, or the labels are not of these images.
        UserError: `out` cannot be written.
    """
    labels_N = map_labels(index, card.classes)
    sets = None if labels is None else read_label_sets(labels, index, card.num_classes)
    total = len(index) * (len(VIEWS[tta]) if tta else 1)
    done = 0

    def told(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    plain_NK, averaged_NK = card_probabilities(
        model, card, index, transform, views=tta, batch_size=batch_size, progress=told
    )
    scores: dict[str, Scores | LabelScores] = {PLAIN: score(plain_NK, labels_N)}
    if averaged_NK is not None:
        scores[str(tta)] = score(averaged_NK, labels_N)
    if sets is not None:
        scores[LABELS] = LabelScores(str(labels), *score_sets(plain_NK, sets))
    found = Evaluation(name, data, split, index.fingerprint, transform.description, scores)
    if out is not None:
        _write(out, index, card.classes, plain_NK, labels_N, asdict(found))
    return found


def override_transform(
    card: ModelCard, crop: int | None, resize: int | None, interpolation: Interpolation | None, tta: str | None
) -> Transform:
    """The card's transform with what is given changed.

    Raises:
        UserError: a value is not known, or the crop is larger than the resized image.
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
    """Scores as JSON; accuracy of each class, the confusion matrix and each image's prediction as CSV."""
    best_N = best_class(plain_NK)
    matrix_KK = confusion(best_N, labels_N, len(classes))
    totals_K, right_K = np.bincount(labels_N, minlength=len(classes)).tolist(), matrix_KK.diagonal().tolist()
    per_class = [
        [name, total, right, f"{right / total:.6f}" if total else ""]
        for name, total, right in zip(classes, totals_K, right_K, strict=True)
    ]
    names = index.names()
    images = []
    for name, label, best, row in zip(names, labels_N, best_N, plain_NK, strict=True):
        answer = ["", "", ""] if best == NO_CLASS else [classes[best], f"{row[best]:.6f}", f"{row[label]:.6f}"]
        images.append([name, classes[label], *answer])
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "per_class.csv", ["class", "images", "top1_correct", "top1"], per_class)
        write_confusion(out / "confusion.csv", classes, matrix_KK)
        write_csv(out / "predictions.csv", ["image", "class", "predicted", "probability", "of_class"], images)
        write_json(out / "scores.json", report)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}.") from error
