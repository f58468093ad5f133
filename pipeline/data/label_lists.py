"""Label lists in CSV or TSV files: each image's class, and optionally its split."""

import csv
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.class_names import to_nfc
from pipeline.data.names import SPLIT_WORDS, is_csv, words_of
from pipeline.errors import DataError, listed

IMAGE_COLUMNS = (
    "file",
    "filename",
    "filepath",
    "path",
    "image",
    "imagename",
    "imagepath",
    "imageid",
    "img",
    "id",
    "name",
)
LABEL_COLUMNS = ("label", "labels", "class", "classname", "classid", "classlabel", "category", "target", "species")
_SPLIT_COLUMNS = ("split", "subset", "set")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a list: image name as in the list, class, split (train, val, test) or None, and file and line."""

    file: str
    label: str
    split: str | None
    location: str


def read_header(file: Path) -> list[str]:
    """Returns the names of a list's columns; empty if the file cannot be read."""
    try:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            line = stream.readline()
    except OSError:
        return []
    return next(csv.reader([line], delimiter=_delimiter(file, line)), [])


def is_label_list(file: Path) -> bool:
    """Whether a file is a CSV file with a column of images and a column of labels."""
    columns = [_letters(name) for name in read_header(file)]
    return is_csv(file.name) and any(c in IMAGE_COLUMNS for c in columns) and any(c in LABEL_COLUMNS for c in columns)


def read_list(file: Path) -> list[Row]:
    """Reads a list's rows. A byte-order mark, `;` instead of `,` and `\\` instead of `/` in paths are accepted.

    Raises:
        DataError: the file cannot be read, lacks a column or a value, has several label columns that disagree, or
            names an unknown split.
    """
    header = read_header(file)
    columns = {_letters(name): name for name in header}
    image_columns = [columns[name] for name in IMAGE_COLUMNS if name in columns]
    label_columns = [columns[name] for name in LABEL_COLUMNS if name in columns]
    if not image_columns or not label_columns:
        raise DataError(
            f"{file} must have a column of image files ({', '.join(IMAGE_COLUMNS)}) and one of labels "
            f"({', '.join(LABEL_COLUMNS)}); its first line is {listed(header) or 'empty'}."
        )
    split_column = next((columns[name] for name in _SPLIT_COLUMNS if name in columns), None)
    rows, meanings = [], set()
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            reader = csv.DictReader(stream, delimiter=_delimiter(file, first), strict=True)
            for line in reader:
                location = f"{file.name}, line {reader.line_num}"
                values = [(line[column] or "").strip() for column in (image_columns[0], *label_columns)]
                if None in line or not all(values):
                    raise DataError(
                        f"{file}, line {reader.line_num}: a value is missing, or there are more values than columns."
                    )
                meanings.add(tuple(values[1:]))
                name = posixpath.normpath(values[0].replace("\\", "/"))
                split = _split_of(line, split_column, f"{file}, line {reader.line_num}")
                rows.append(Row(name, to_nfc(values[1]), split, location))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as a list of labels ({error}): save it as CSV in UTF-8.") from error
    if any(len({meaning[i] for meaning in meanings}) != len(meanings) for i in range(len(label_columns))):
        raise DataError(
            f"{file} has several columns of labels that differ, {listed(label_columns)}: remove all but one."
        )
    return rows


def _split_of(line: dict[str, str | None], column: str | None, location: str) -> str | None:
    if column is None:
        return None
    words = words_of(line[column] or "")
    found = [name for name, names in (SPLIT_WORDS | {"test": {"test", "testing"}}).items() if words & names]
    if len(found) != 1:
        raise DataError(f"{location}: {column}={line[column]} is unknown: use train, val or test.")
    return found[0]


def find_label_lists(folders: Sequence[Path]) -> list[Path]:
    """Returns the CSV and TSV files in the folders, in sorted order."""
    return [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()) if is_csv(file.name)]


def _delimiter(file: Path, header: str) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())
