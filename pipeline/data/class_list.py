"""Class lists: text files that choose classes by name, one per line, and may merge them into new ones."""

import csv
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.class_names import to_nfc
from pipeline.errors import DataError, listed

_MAX_SIMILAR = 5  # unknown names for which a similar one is looked up


def read_class_list(file: Path, known: Sequence[str]) -> dict[str, str]:
    """Returns the new name of each listed class, by its old name; without a second column they are equal.

    A line has a class and optionally its new name, `n01440764` or `n01440764 fish`. If the file has tabs or commas,
    these separate the columns and names may contain spaces; otherwise white space does. Empty lines and lines that
    begin with `#` are skipped; without tabs and commas, so is the rest of a line after ` #`.

    Args:
        file: The list, in UTF-8.
        known: The names of all classes that exist.

    Raises:
        DataError: the file cannot be read, names unknown classes, gives a class two new names, or leaves fewer than two
            classes.
    """
    new_names: dict[str, str] = {}
    known_names = set(known)
    unknown: list[str] = []
    for number, fields in _rows(file):
        if len(fields) > 2 or not all(fields):
            raise DataError(
                f"{file}, line {number}: {' '.join(fields)!r} has {len(fields)} columns or an empty one; a line has a "
                f"class, or a class and its new name. Separate them by a comma or tab if names contain spaces."
            )
        old, new = fields[0], fields[-1]
        if old not in known_names:
            unknown.append(old)
        elif new_names.setdefault(old, new) != new:
            raise DataError(
                f"{file}, line {number}: class {old} becomes {new}, and {new_names[old]} in an earlier "
                f"line: remove one."
            )
    if unknown:
        raise DataError(
            f"{file} has {len(unknown):,} classes that do not exist: {listed(_with_similar(unknown, known))}. Correct "
            f"or remove them; the data has {len(known):,} classes, such as {', '.join(known[:2])}."
        )
    classes = sorted(set(new_names.values()))
    if len(classes) < 2:
        raise DataError(
            f"{file} leaves {f'only the class {classes[0]}' if classes else 'no class'}: list at least two classes."
        )
    return new_names


def relabel(new_names: Mapping[str, str], known: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Returns the new classes, and the new label of each of the K known classes (int32 [K], -1: not listed).

    If no class is renamed, the new classes keep their order; otherwise they are sorted.
    """
    kept = [name for name in known if name in new_names]
    renamed = any(new_names[name] != name for name in kept)
    classes = tuple(sorted(set(new_names.values())) if renamed else kept)
    labels = {name: label for label, name in enumerate(classes)}
    return classes, np.array([labels[new_names[name]] if name in new_names else -1 for name in known], np.int32)


def _rows(file: Path) -> Iterable[tuple[int, list[str]]]:
    """Yields each line's number and fields, without spaces around them and in Unicode normal form C."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a list of classes ({error}): save it as text in UTF-8.") from error
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
    delimiter = next((mark for mark in "\t," if any(mark in line for _, line in numbered)), None)
    if file.suffix.lower() in (".csv", ".tsv"):
        delimiter = {".csv": ",", ".tsv": "\t"}[file.suffix.lower()]
    for number, line in numbered:
        if delimiter is None:
            fields = re.sub(r"\s#.*", "", line).split()
        else:
            fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        yield number, [to_nfc(field.strip()) for field in fields]


def _with_similar(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Returns names as text, the first few with a similar known one."""
    similar = [difflib.get_close_matches(name, known, 1) if i < _MAX_SIMILAR else [] for i, name in enumerate(names)]
    return [
        f"{name!r} (similar: {found[0]!r})" if found else repr(name) for name, found in zip(names, similar, strict=True)
    ]
