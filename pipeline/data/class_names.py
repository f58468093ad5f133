"""Class names: Unicode normalization, and checks for missing, unknown and suspicious classes."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import DataError, listed


def to_nfc(name: str) -> str:
    """Converts a class name to Unicode normal form C; macOS stores folder names in form D."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def folders_by_class(folders: Iterable[str], where: Path) -> dict[str, str]:
    """Maps class names to folder names, in sorted order.

    Raises:
        DataError: two folders' names differ only in their Unicode normal form.
    """
    found: dict[str, str] = {}
    for folder in sorted(folders):
        other = found.setdefault(to_nfc(folder), folder)
        if other != folder:
            raise DataError(
                f"{where} has two folders that are both the class {to_nfc(folder)!r}, {other!a} and "
                f"{folder!a}: their names differ only in Unicode normal form. Move their files into one."
            )
    return dict(sorted(found.items()))


def check_known_classes(split: object, classes: Iterable[str], known: Sequence[str]) -> None:
    """Raises `DataError` if a split has classes that are not training classes; the message suggests similar names."""
    known_set = set(known)
    unknown = [name for name in classes if name not in known_set]
    if unknown:
        alike = {_plain(name): name for name in known}
        names = [f"{name!r} (similar: {alike[_plain(name)]!r})" if _plain(name) in alike else name for name in unknown]
        raise DataError(
            f"{split} has classes that the training split lacks: {listed(names)}. Add, rename or remove them."
        )


def require_two_classes(classes: Sequence[str], where: object, lists: Sequence[str] = ()) -> None:
    """Raises `DataError` if there are fewer than two classes; `lists` are CSV files that may hold the labels."""
    if len(classes) > 1:
        return
    hint = f" ({listed(lists)} may hold them)" if lists else ""
    raise DataError(
        f"{where} has only one class, {listed(classes) or 'none'}: any prediction would be correct. Each class "
        f"needs its own folder, train/CLASS/*; with labels in a CSV file{hint}, `densenet data prepare` creates a "
        f"data set from images and file."
    )


def class_name_warnings(classes: Sequence[str]) -> list[str]:
    """Returns warnings about class names that are valid but probably a mistake."""
    warnings = []
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(_plain(name), []).append(name)
    same = [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    if same:
        warnings.append(f"classes whose names differ only in case or spaces are different classes: {listed(same)}")
    spaced = [repr(name) for name in classes if name != name.strip()]
    if spaced:
        warnings.append(f"class names begin or end with spaces: {listed(spaced)}")
    if all(name.isdecimal() for name in classes):
        moved = [f"{name!r} has label {label}" for label, name in enumerate(classes) if int(name) != label]
        if moved:
            warnings.append(f"class names are numbers, but labels are positions in the sorted list: {listed(moved)}")
    return warnings


def missing_class_warning(classes: Sequence[str], counts_K: Sequence[int], split: str) -> str | None:
    """Returns a warning that names the classes without images in a split; None if there are none."""
    names = [name for name, count in zip(classes, counts_K, strict=True) if count == 0]
    return f"{split} has no image of {len(names):,} of the {len(classes):,} classes: {listed(names)}" if names else None


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
