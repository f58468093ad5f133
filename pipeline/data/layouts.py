"""What a data folder holds: splits, class folders, image files."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError

_CLUTTER = {"thumbs.db", "desktop.ini"}
_SHOWN = 5


@dataclass(frozen=True)
class ImageFile:
    """A file below a split's folder, as the file system describes it."""

    path: str
    label: int
    length: int
    mtime_ns: int


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def find_splits(root: str | None, train: str, val: str) -> tuple[Path, Path]:
    """The folders of the two splits below `data.root`.

    Raises:
        DataError: the root is not given or one of the folders is missing.
    """
    if root is None:
        raise DataError("data.root is not set: add data.root=DIR, where DIR holds train/CLASS/* and val/CLASS/*.")
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"data.root={root} is not a folder: give one that holds {train}/CLASS/* and {val}/CLASS/*.")
    for key, name in (("train", train), ("val", val)):
        if not (folder / name).is_dir():
            there = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
            found = f"folders there: {listed(there)}" if there else "there are no folders in it"
            raise DataError(f"data.root={root} has no folder '{name}' ({found}): correct data.root or data.{key}.")
    return folder / train, folder / val


def list_classes(split: Path) -> tuple[str, ...]:
    """Names of a split's class folders in sorted order; a class's label is its rank.

    Raises:
        DataError: there are no class folders, or pictures lie beside them.
    """
    entries = [e for e in os.scandir(split) if not _is_clutter(e.name)]
    loose = sorted(e.name for e in entries if not e.is_dir())
    if loose:
        raise DataError(
            f"{split} holds files outside class folders: {listed(loose)}. Each class needs a folder of its own, "
            f"{split.name}/CLASS/*; ImageNet's validation archive is flat and has to be sorted into them first."
        )
    classes = tuple(sorted(e.name for e in entries))
    if not classes:
        raise DataError(f"{split} has no class folders: it must hold {split.name}/CLASS/*.")
    return classes


def list_images(split: Path, classes: Sequence[str], train_classes: Sequence[str]) -> list[ImageFile]:
    """All files of a split's class folders in sorted order, labelled by rank in `train_classes`.

    Raises:
        DataError: a class is not among the training classes, is empty, or has folders in it.
    """
    labels = {name: label for label, name in enumerate(train_classes)}
    unknown = [name for name in classes if name not in labels]
    if unknown:
        raise DataError(f"{split} has classes that the training split lacks: {listed(unknown)}. Add or remove them.")
    images: list[ImageFile] = []
    empty: list[str] = []
    for name in classes:
        found = list(_files(split / name, name, labels[name]))
        if not found:
            empty.append(name)
        images += sorted(found, key=lambda image: image.path)
    if empty:
        raise DataError(f"{split} has class folders without files: {listed(empty)}. Fill or remove them.")
    return images


def _files(folder: Path, name: str, label: int) -> Iterable[ImageFile]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_clutter(entry.name):
                continue
            if entry.is_dir():
                raise DataError(f"{entry.path} is a folder inside a class folder: only image files may be there.")
            stat = entry.stat()
            yield ImageFile(f"{name}/{entry.name}", label, stat.st_size, stat.st_mtime_ns)


def _is_clutter(name: str) -> bool:
    """What file managers leave behind, and hidden files."""
    return name.startswith(".") or name.lower() in _CLUTTER
