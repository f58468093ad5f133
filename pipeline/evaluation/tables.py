"""Writes tables as CSV and results as JSON."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.files import atomic_file, write_text

CONFUSION = Path("evaluation", "confusion.csv")  # in the run folder: confusion matrix of the best evaluation


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file atomically; creates its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def write_confusion(file: Path, classes: Sequence[str], matrix_KK: NDArray[np.int64]) -> None:
    """Writes a confusion matrix: one row per true class, one column per predicted class, limited to `classes`."""
    size = len(classes)
    rows = zip(classes, matrix_KK[:size, :size].tolist(), strict=True)
    write_csv(file, ["class", *classes], [[name, *row] for name, row in rows])


def read_confusion(text: str) -> tuple[list[str], NDArray[np.int64]]:
    """Parses the text of a file by `write_confusion` into classes and matrix."""
    header, *rows = csv.reader(io.StringIO(text))
    return header[1:], np.array([row[1:] for row in rows], np.int64)


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(file, json.dumps(content, indent=2) + "\n")
