"""Tables as CSV files, and results as JSON."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.files import atomic_file, write_text

CONFUSION = Path("evaluation", "confusion.csv")  # in a run's folder: that of the best evaluation


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a whole table; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as aside, aside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def write_confusion(file: Path, classes: Sequence[str], matrix_KK: NDArray[np.int64]) -> None:
    """Writes a confusion matrix: a row for each true class, a column for each predicted one; unused ones left out."""
    size = len(classes)
    rows = zip(classes, matrix_KK[:size, :size].tolist(), strict=True)
    write_csv(file, ["class", *classes], [[name, *row] for name, row in rows])


def read_confusion(text: str) -> tuple[list[str], NDArray[np.int64]]:
    """Classes and matrix, from the text that `write_confusion` has written."""
    header, *rows = csv.reader(io.StringIO(text))
    return header[1:], np.array([row[1:] for row in rows], np.int64)


def write_json(file: Path, content: Any) -> None:
    """Writes a whole JSON file."""
    write_text(file, json.dumps(content, indent=2) + "\n")
