"""Lists of labels in CSV or TSV files: which image is of which class, and of which split where they say so."""

import csv
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.class_names import normal
from pipeline.data.names import SPLIT_WORDS, is_list, words_of
from pipeline.errors import DataError, listed

FILE = ("file", "filename", "filepath", "path", "image", "imagename", "imagepath", "imageid", "img", "id", "name")
LABEL = ("label", "labels", "class", "classname", "classid", "classlabel", "category", "target", "species")
_SPLIT = ("split", "subset", "set")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a list: the image as it is called there, its class, its split (train, val, test) or None."""

    file: str
    label: str
    split: str | None
    where: str


def read_header(file: Path) -> list[str]:
    """The names of a list's columns; none where it cannot be read."""
    try:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            line = stream.readline()
    except OSError:
        return []
    return next(csv.reader([line], delimiter=_delimiter(file, line)), [])


def names_images_and_labels(file: Path) -> bool:
    """Whether a file is a list with a column of images and one of labels."""
    columns = [_plain(name) for name in read_header(file)]
    return is_list(file.name) and any(c in FILE for c in columns) and any(c in LABEL for c in columns)


def read_list(file: Path) -> list[Row]:
    """The lines of a list. A byte-order mark, `;` for `,` and `\\` for `/` in paths are as good.

    Raises:
        DataError: it cannot be read, lacks a column or a value, has several columns of labels that do not mean the
            same, or names a split that is not known.
    """
    header = read_header(file)
    columns = {_plain(name): name for name in header}
    images = [columns[name] for name in FILE if name in columns]
    labels = [columns[name] for name in LABEL if name in columns]
    if not images or not labels:
        raise DataError(
            f"{file} must have a column of image files ({', '.join(FILE)}) and one of labels ({', '.join(LABEL)}); its "
            f"first line is {listed(header) or 'empty'}."
        )
    split = next((columns[name] for name in _SPLIT if name in columns), None)
    rows, meanings = [], set()
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            reader = csv.DictReader(stream, delimiter=_delimiter(file, first), strict=True)
            for line in reader:
                where = f"{file.name}, line {reader.line_num}"
                values = [(line[column] or "").strip() for column in (images[0], *labels)]
                if None in line or not all(values):
                    raise DataError(f"{file}, line {reader.line_num}: a value is missing or one too many is there.")
                meanings.add(tuple(values[1:]))
                name = posixpath.normpath(values[0].replace("\\", "/"))
                rows.append(
                    Row(name, normal(values[1]), _split_of(line, split, f"{file}, line {reader.line_num}"), where)
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as a list of labels ({error}): save it as CSV in UTF-8.") from error
    if any(len({meaning[i] for meaning in meanings}) != len(meanings) for i in range(len(labels))):
        raise DataError(f"{file} has several columns of labels that differ, {listed(labels)}: remove all but one.")
    return rows


def _split_of(line: dict[str, str | None], column: str | None, where: str) -> str | None:
    if column is None:
        return None
    words = words_of(line[column] or "")
    found = [name for name, names in (SPLIT_WORDS | {"test": {"test", "testing"}}).items() if words & names]
    if len(found) != 1:
        raise DataError(f"{where}: {column}={line[column]} is not known: use train, val or test.")
    return found[0]


def list_files_of(folders: Sequence[Path]) -> list[Path]:
    """The files in folders that are lists by their names, in sorted order."""
    return [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()) if is_list(file.name)]


def _delimiter(file: Path, header: str) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())
