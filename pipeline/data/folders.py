"""Class folders, `ROOT/SPLIT/CLASS/*`: finds and lists them, without opening a file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.class_names import check_known_classes, folders_by_class
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.listing import entries, printable
from pipeline.data.names import SPLIT_WORDS, is_compressed, is_csv, words_of
from pipeline.data.progress import Progress
from pipeline.errors import DataError, listed


@dataclass(frozen=True)
class ImageFile:
    """A file below the data's root, as the file system describes it."""

    path: str
    label: int
    length: int
    mtime_ns: int


@dataclass(frozen=True, eq=False)
class FolderFiles:
    """The F files of one folder, sorted by name; columns, because a data set may have a hundred million files.

    `folder` is the path below the root with a slash at the end, `names` has large strings, `lengths_F` bytes and
    `mtimes_F` nanoseconds, both int64.
    """

    folder: str
    label: int
    names: pa.Array
    lengths_F: NDArray[np.int64]
    mtimes_F: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths_F)

    def take(self, rows: NDArray[np.int64]) -> "FolderFiles":
        """Returns some of the files."""
        names = self.names.take(pa.array(rows))
        return FolderFiles(self.folder, self.label, names, self.lengths_F[rows], self.mtimes_F[rows])


@dataclass
class Listing:
    """A split's files in sorted order; problems of unusable files, by path below the root; ignored files."""

    folders: list[FolderFiles] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)

    def __len__(self) -> int:
        """The number of files, the unusable ones included."""
        return sum(map(len, self.folders)) + len(self.problems)

    def images(self) -> Iterator[ImageFile]:
        """Yields the files one by one."""
        for part in self.folders:
            for name, length, mtime_ns in zip(part.names.to_pylist(), part.lengths_F, part.mtimes_F, strict=True):
                yield ImageFile(part.folder + name, part.label, int(length), int(mtime_ns))


def find_splits(root: str | None, train: str, val: str) -> tuple[Path, Path]:
    """Returns the folders of the two splits below `data.root`.

    Raises:
        DataError: the root is not set or one of the folders is missing.
    """
    if root is None:
        raise DataError("data.root is not set: add data.root=DIR, where DIR contains train/CLASS/* and val/CLASS/*.")
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(
            f"data.root={root} is not a folder: set it to one that contains {train}/CLASS/* and {val}/CLASS/*."
        )
    for key, name in (("train", train), ("val", val)):
        if not (folder / name).is_dir():
            existing = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
            contents = f"in it: {listed(existing)}" if existing else "it is empty"
            others = [n for n in existing if n not in (train, val) and (folder / n).is_dir()]
            suggested = [f"data.{key}={n}" for n in others if words_of(n) & SPLIT_WORDS[key]]
            suggested += [f"data.{key}={n}" for n in others if key == "val" and not suggested and "test" in words_of(n)]
            compressed = [n for n in existing if is_compressed(n)]
            advice = f"correct data.root or data.{key}"
            if suggested:
                advice = f"set {' or '.join(suggested)}"
            elif compressed:
                advice = f"unpack {listed(compressed)} first"
            elif len(others) > 1 and not (folder / train).is_dir() and not (folder / val).is_dir():
                advice = f"if these are the classes, move them into {train} and a part of each one's images into {val}"
            raise DataError(
                f"data.root={root} has no folder '{name}' ({contents}): {advice}, or create a data set from archives "
                f"with `densenet data prepare`."
            )
    return folder / train, folder / val


def list_classes(split: Path, ignored: IgnoredFiles | None = None) -> dict[str, str]:
    """Maps a split's class names, sorted, to folder names; a class's label is its position.

    Raises:
        DataError: there are no class folders, there are files next to them, or two are the same class or folder.
    """
    folders: dict[tuple[int, int], str] = {}
    loose = []
    for entry in entries(split, split.name, ignored or IgnoredFiles()):
        if isinstance(entry, tuple):
            raise DataError(f"{split / entry[0]} {entry[1]}. Fix or remove it: {split} may contain only class folders.")
        if not entry.is_folder:
            loose.append(entry.name)
        elif (other := folders.setdefault(entry.identity, entry.name)) != entry.name:
            raise DataError(f"{split / other} and {split / entry.name} are the same folder, but would be two classes.")
    if loose:
        lists = [name for name in loose if is_csv(name)]
        with_list = f" It also reads labels from a CSV file ({listed(lists)})." if lists else ""
        raise DataError(
            f"{split} has files outside class folders: {listed(sorted(loose))}. Each class needs its own folder, "
            f"{split.name}/CLASS/*; ImageNet's validation images are flat: `densenet data prepare` sorts them by class."
            + with_list
        )
    if not folders:
        raise DataError(f"{split} has no class folders: it must contain {split.name}/CLASS/*.")
    return folders_by_class(folders.values(), split)


def list_images(split: Path, classes: dict[str, str], train_classes: Sequence[str]) -> Listing:
    """Lists all files of a split's class folders, labeled by position in `train_classes`.

    `classes` comes from `list_classes`.

    Raises:
        DataError: a class is not a training class, is empty, or contains folders.
    """
    labels = {name: label for label, name in enumerate(train_classes)}
    check_known_classes(split, classes, train_classes)
    listing, progress = Listing(), Progress(f"listing {split.name}")
    empty: list[str] = []
    for name, folder in classes.items():
        before = len(listing)
        list_files(split / folder, f"{split.name}/{folder}", labels[name], listing)
        if len(listing) == before:
            empty.append(name)
        progress.add(len(listing) - before)
    if empty:
        raise DataError(f"{split} has class folders without files: {listed(empty)}. Fill or remove them.")
    return listing


def list_files(folder: Path, prefix: str, label: int, listing: Listing) -> None:
    """Adds the files of one folder to `listing`; `prefix` is the folder's path below the root.

    Raises:
        DataError: it contains a folder.
    """
    names, lengths, mtimes = [], [], []
    for entry in entries(folder, prefix, listing.ignored):
        if isinstance(entry, tuple):
            listing.problems[f"{prefix}/{entry[0]}"] = entry[1]
        elif entry.is_folder:
            raise DataError(
                f"{printable(entry.path)} is a folder inside a class folder, which may contain only image files. If "
                f"it is the class, and {folder.name} a group of classes, move or link it to {folder.parent}."
            )
        else:
            names.append(entry.name)
            lengths.append(entry.length)
            mtimes.append(entry.mtime_ns)
    if names:
        columns = np.array(lengths, np.int64), np.array(mtimes, np.int64)
        listing.folders.append(FolderFiles(f"{prefix}/", label, pa.array(names, pa.large_string()), *columns))
