"""Class names: how they are written, and what makes a set of classes doubtful or useless."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, listed


def normal(name: str) -> str:
    """A class name in Unicode's normal form C: macOS writes folders' names in form D, other systems don't."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def folders_by_class(folders: Iterable[str], where: Path) -> dict[str, str]:
    """The folder of each class, by class name in sorted order.

    Raises:
        DataError: two folders have names that differ in their Unicode normal form alone.
    """
    found: dict[str, str] = {}
    for folder in sorted(folders):
        other = found.setdefault(normal(folder), folder)
        if other != folder:
            raise DataError(
                f"{where} has two folders that are both the class {normal(folder)!r}, {other!a} and "
                f"{folder!a}: their names differ in Unicode normal form alone. Put their files into one."
            )
    return dict(sorted(found.items()))


def unknown_classes(split: object, classes: Iterable[str], known: Sequence[str]) -> None:
    """Raises `DataError` where a split has classes that the training split lacks; those nearly the same are named."""
    there = set(known)
    unknown = [name for name in classes if name not in there]
    if unknown:
        alike = {_plain(name): name for name in known}
        names = [f"{name!r} (there is {alike[_plain(name)]!r})" if _plain(name) in alike else name for name in unknown]
        raise DataError(
            f"{split} has classes that the training split lacks: {listed(names)}. Add, rename or remove them."
        )


def refuse_one_class(classes: Sequence[str], where: object, lists: Sequence[str] = ()) -> None:
    """Raises `DataError` where there are fewer than two classes; `lists` are CSV files that may hold the labels."""
    if len(classes) > 1:
        return
    there = f" ({listed(lists)} may hold them)" if lists else ""
    raise DataError(
        f"{where} has only one class, {listed(classes) or 'none'}: whatever a model answers would be right. Each class "
        f"needs a folder of its own, train/CLASS/*; with labels in a CSV file{there}, `densenet data prepare` makes a "
        f"data set of images and file."
    )


def doubts(classes: Sequence[str]) -> list[str]:
    """A line on each thing about class names that is allowed and probably not meant."""
    found = []
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(_plain(name), []).append(name)
    same = [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    if same:
        found.append(f"classes whose names differ only in case or spaces are different classes: {listed(same)}")
    spaced = [repr(name) for name in classes if name != name.strip()]
    if spaced:
        found.append(f"class names begin or end with spaces: {listed(spaced)}")
    if all(name.isdecimal() for name in classes):
        moved = [f"{name!r} has label {label}" for label, name in enumerate(classes) if int(name) != label]
        if moved:
            found.append(f"class names are numbers, and labels are their places in the list: {listed(moved)}")
    return found


def absent(classes: Sequence[str], labels_N: NDArray[np.int64], split: str) -> str | None:
    """A line on the classes of which a split has no image, if any."""
    counts_K = np.bincount(labels_N, minlength=len(classes))
    names = [classes[k] for k in np.flatnonzero(counts_K == 0).tolist()]
    return f"{split} has no image of {len(names):,} of the {len(classes):,} classes: {listed(names)}" if names else None


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
