"""`densenet eval`: a model's accuracy on a split, and what lies behind it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from launch.progress import accuracy, number
from launch.sources import model_folder
from pipeline.config import Interpolation
from pipeline.data.dataset import open_split
from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.evaluation.labels import labels_of, read_label_sets
from pipeline.evaluation.probabilities import VIEWS, Transform, model_probabilities
from pipeline.evaluation.scores import NO_CLASS, best_class, confusion, score, score_sets
from pipeline.evaluation.tables import write_confusion, write_csv
from pipeline.files import write_text
from pipeline.model.sources import read_card
from pipeline.tracking.stores import Stores


@dataclass(frozen=True)
class Options:
    """What `densenet eval` may be told; None: as in the model's card."""

    split: str
    crop: int | None
    resize: int | None
    interpolation: Interpolation | None
    views: str | None
    labels: Path | None
    out: Path | None
    batch_size: int


def eval_command(console: Console, model: str, root: Path, options: Options, stores: Stores, as_json: bool) -> None:
    """Prints the scores of a checkpoint, a run or a registered model, and writes the tables to `options.out`.

    Raises:
        UserError: there is no such model or split, or its classes, sizes or labels do not fit.
    """
    if options.views is not None and options.views not in VIEWS:
        raise UserError(f"--tta={options.views} is not known: use {' or '.join(VIEWS)}.")
    if options.interpolation not in (None, "bilinear", "bicubic"):
        raise UserError(f"--interpolation={options.interpolation} is not known: use bilinear or bicubic.")
    folder = model_folder(model, stores)
    card = read_card(folder)
    transform = Transform(**card["transform"]).at(options.crop, options.resize, options.interpolation)
    if transform.crop > transform.resize:
        raise UserError(f"--crop={transform.crop} must not exceed --resize={transform.resize}.")
    index = open_split(root, options.split, Path("outputs").absolute() / "index", card["max_pixels"])
    labels_N = labels_of(index, card["classes"])
    sets = None if options.labels is None else read_label_sets(options.labels, index, card["num_classes"])
    passes = len(VIEWS[options.views]) if options.views else 1
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=passes * len(index))
        plain_NK, averaged_NK = model_probabilities(
            folder,
            index,
            transform,
            views=options.views,
            batch_size=options.batch_size,
            progress=lambda pictures: bar.advance(task, pictures),
        )
    found: dict[str, Any] = {"plain": asdict(score(plain_NK, labels_N))}
    if averaged_NK is not None:
        found[str(options.views)] = asdict(score(averaged_NK, labels_N))
    if sets is not None:
        correct, total = score_sets(plain_NK, sets)
        found["labels"] = {"file": str(options.labels), "top1_correct": correct, "total": total}
    about = {"model": model, "data": str(root), "split": options.split, "fingerprint": index.fingerprint}
    report = about | {"transform": transform.description, "scores": found}
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(console, f"{model} ({folder / card['weights']})", index, transform, found)
    if options.out is None:
        return
    _write(options.out, index, card["classes"], plain_NK, labels_N, report)
    if not as_json:
        console.print(f"tables in {options.out}", markup=False, soft_wrap=True)


def _print(console: Console, model: str, index: DatasetIndex, transform: Transform, found: dict[str, Any]) -> None:
    lines = [("model", model), ("data", f"{len(index):,} images in {index.root}"), ("as", transform.description)]
    for name, scores in found.items():
        if name == "labels":
            total = scores["total"]
            share = f"{scores['top1_correct']}/{total} = {100 * scores['top1_correct'] / max(1, total):.2f} %"
            lines.append(("labels", f"top-1 {share} by {scores['file']}, {len(index) - total} images without label"))
        else:
            text = (
                f"{accuracy(scores)}, loss {number(scores['loss'])}, calibration error "
                f"{number(scores['calibration_error'])}"
            )
            lines.append((name, text))
    for name, text in lines:
        console.print(f"{name:10}{text}", markup=False, soft_wrap=True)


def _write(
    out: Path,
    index: DatasetIndex,
    classes: list[str],
    plain_NK: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    report: dict[str, Any],
) -> None:
    """Scores as JSON; accuracy of each class, the confusion matrix and each picture's prediction as CSV."""
    best_N = best_class(plain_NK)
    matrix_KK = confusion(best_N, labels_N, len(classes))
    totals_K, right_K = np.bincount(labels_N, minlength=len(classes)).tolist(), matrix_KK.diagonal().tolist()
    per_class = [
        [name, total, right, f"{right / total:.6f}" if total else ""]
        for name, total, right in zip(classes, totals_K, right_K, strict=True)
    ]
    names = index.names()
    pictures = []
    for name, label, best, row in zip(names, labels_N, best_N, plain_NK, strict=True):
        answer = ["", "", ""] if best == NO_CLASS else [classes[best], f"{row[best]:.6f}", f"{row[label]:.6f}"]
        pictures.append([name, classes[label], *answer])
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "per_class.csv", ["class", "images", "top1_correct", "top1"], per_class)
        write_confusion(out / "confusion.csv", classes, matrix_KK)
        write_csv(out / "predictions.csv", ["image", "class", "predicted", "probability", "of_class"], pictures)
        write_text(out / "scores.json", json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}.") from error
