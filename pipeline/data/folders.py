"""Class folders: `ROOT/SPLIT/CLASS/*`, listed, looked at and indexed without being copied."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pipeline.config import MAX_PIXELS
from pipeline.data.class_names import folders_by_class, refuse_one_class, unknown_classes
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.images import HEAD, TAIL, Header, NotAnImage, TooLarge, check_size, header, quiet
from pipeline.data.index import DatasetIndex, load_table, table_of
from pipeline.data.label_lists import list_files_of, names_images_and_labels
from pipeline.data.listing import SYSTEM, entries, printable, tree
from pipeline.data.names import SPLIT_WORDS, is_list, is_packed, words_of
from pipeline.errors import DataError, listed

_CACHE = 2  # a cached index tells which files are used, so this changes when other files become so
_TOGETHER = 256  # files that a thread looks at in one go: a task for each of a million files would cost gigabytes


@dataclass(frozen=True)
class ImageFile:
    """A file below the data's root, as the file system describes it."""

    path: str
    label: int
    length: int
    mtime_ns: int


@dataclass
class Listing:
    """A split's files in sorted order; what is wrong with the rest, by path below the root; what is left out."""

    images: list[ImageFile] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)


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
            there = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
            found = f"in it: {listed(there)}" if there else "it is empty"
            others = [n for n in there if n not in (train, val) and (folder / n).is_dir()]
            meant = [f"data.{key}={n}" for n in others if words_of(n) & SPLIT_WORDS[key]]
            meant += [f"data.{key}={n}" for n in others if key == "val" and not meant and "test" in words_of(n)]
            packed = [n for n in there if is_packed(n)]
            advice = f"correct data.root or data.{key}"
            if meant:
                advice = f"set {' or '.join(meant)}"
            elif packed:
                advice = f"unpack {listed(packed)} first"
            elif len(others) > 1 and not (folder / train).is_dir() and not (folder / val).is_dir():
                advice = f"if these are the classes, move them into {train} and a share of each one's images into {val}"
            raise DataError(
                f"data.root={root} has no folder '{name}' ({found}): {advice}, or make a data set from archives with "
                f"`densenet data prepare`."
            )
    return folder / train, folder / val


def list_classes(split: Path, ignored: IgnoredFiles | None = None) -> dict[str, str]:
    """The folder of each class of a split, by class name in sorted order; a class's label is its rank.

    Raises:
        DataError: there are no class folders, files lie beside them, or two are the same class or the same folder.
    """
    folders: dict[tuple[int, int], str] = {}
    loose = []
    for entry in entries(split, split.name, ignored or IgnoredFiles()):
        if isinstance(entry, tuple):
            raise DataError(f"{split / entry[0]} {entry[1]}. Mend or remove it: only class folders may be in {split}.")
        if not entry.is_folder:
            loose.append(entry.name)
        elif (other := folders.setdefault(entry.identity, entry.name)) != entry.name:
            raise DataError(f"{split / other} and {split / entry.name} are the same folder, and would be two classes.")
    if loose:
        lists = [name for name in loose if is_list(name)]
        with_list = f" With labels in a file ({listed(lists)}), so does it." if lists else ""
        raise DataError(
            f"{split} holds files outside class folders: {listed(sorted(loose))}. Each class needs a folder of its "
            f"own, {split.name}/CLASS/*; ImageNet's validation images are flat: `densenet data prepare` sorts them."
            + with_list
        )
    if not folders:
        raise DataError(f"{split} has no class folders: it must hold {split.name}/CLASS/*.")
    return folders_by_class(folders.values(), split)


def list_images(split: Path, classes: dict[str, str], train_classes: Sequence[str]) -> Listing:
    """All files of a split's class folders, labeled by rank in `train_classes`; `classes` are from `list_classes`.

    Raises:
        DataError: a class is not among the training classes, is empty, or has folders in it.
    """
    labels = {name: label for label, name in enumerate(train_classes)}
    unknown_classes(split, classes, train_classes)
    listing = Listing()
    empty: list[str] = []
    for name, folder in classes.items():
        images, problems = len(listing.images), len(listing.problems)
        list_files(split / folder, f"{split.name}/{folder}", labels[name], listing)
        if images == len(listing.images) and problems == len(listing.problems):
            empty.append(name)
    if empty:
        raise DataError(f"{split} has class folders without files: {listed(empty)}. Fill or remove them.")
    return listing


def list_files(folder: Path, prefix: str, label: int, listing: Listing) -> None:
    """Adds the files of one folder; `prefix` is the folder's path below the root.

    Raises:
        DataError: there is a folder in it.
    """
    for entry in entries(folder, prefix, listing.ignored):
        if isinstance(entry, tuple):
            listing.problems[f"{prefix}/{entry[0]}"] = entry[1]
        elif entry.is_folder:
            raise DataError(
                f"{printable(entry.path)} is a folder inside a class folder: only image files may be there. If it is "
                f"the class, and {folder.name} a group of classes, move or link it to {folder.parent}."
            )
        else:
            listing.images.append(ImageFile(f"{prefix}/{entry.name}", label, entry.length, entry.mtime_ns))


def scan_splits(
    root: str | None,
    train: str,
    val: str,
    cache: Path,
    skip_corrupt: bool,
    warn: Callable[[str], None],
    max_pixels: int = MAX_PIXELS,
) -> tuple[DatasetIndex, DatasetIndex]:
    """Indexes of class folders.

    Files already known to the index in the folder `cache` (same path, length and time) are not opened again. Corrupt
    training files, and those of more than `max_pixels`, are left out and told to `warn` with `skip_corrupt`; in the
    evaluation split they never are.

    Raises:
        DataError: a folder is missing or is not laid out in class folders, or files are corrupt or are no images.
    """
    train_folder, val_folder = find_splits(root, train, val)
    try:
        ignored = IgnoredFiles()
        folders = list_classes(train_folder, ignored)
        classes = tuple(folders)
        refuse_one_class(classes, train_folder, [n for n in sorted(os.listdir(train_folder.parent)) if is_list(n)])
        train_listing = list_images(train_folder, folders, classes)
        val_listing = list_images(val_folder, list_classes(val_folder, ignored), classes)
        folder = train_folder.parent.absolute()
        train_index, problems = _index(folder, train, classes, train_listing, cache, max_pixels)
        count = len(train_listing.images) + len(train_listing.problems)
        if skip_corrupt and problems:
            warn(f"{len(problems)} of {count} training files are left out:\n  " + listed(problems, "\n  "))
        else:
            _refuse(train_folder, problems, count)
        val_index, problems = _index(folder, val, classes, val_listing, cache, max_pixels)
        _refuse(val_folder, problems, len(val_listing.images) + len(val_listing.problems))
        for file in list_files_of([train_folder.parent, train_folder, val_folder]):
            if names_images_and_labels(file):
                warn(f"{file} is not read, labels are the class folders' names: `densenet data prepare` reads it")
        if train != val and train_folder.samefile(val_folder):
            warn(f"{train_folder} and {val_folder} are the same folder: the training images are evaluated")
    except OSError as error:
        raise DataError(f"{error.filename} cannot be used: {error.strerror}.") from error
    ignored.merge(train_listing.ignored)
    ignored.merge(val_listing.ignored)
    for line in ignored.lines(without=SYSTEM):
        warn(f"left out: {line}")
    return train_index, val_index


def scan_split(root: Path, split: str, cache: Path, max_pixels: int = MAX_PIXELS) -> DatasetIndex:
    """The index of one split's class folders, or of class folders in the root itself, where there is no such split.

    Raises:
        DataError: as `scan_splits`.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give one that holds {split}/CLASS/* or CLASS/*.")
    folder = root / split if (root / split).is_dir() else root
    try:
        if any(entry.is_dir() and _holds_folders(entry) for entry in folder.iterdir()):
            raise DataError(
                f"{root} has no split '{split}', it has {listed(list(list_classes(root)))}: correct the name."
            )
        classes = list_classes(folder)
        listing = list_images(folder, classes, tuple(classes))
        index, problems = _index(folder.parent.absolute(), folder.name, tuple(classes), listing, cache, max_pixels)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be used: {error.strerror}.") from error
    _refuse(folder, problems, len(listing.images) + len(listing.problems))
    return index


def scan_images(folder: Path, max_pixels: int = MAX_PIXELS) -> tuple[DatasetIndex, dict[str, str], IgnoredFiles]:
    """All files below a folder, at any depth, in sorted order, linked folders too: an index of the images, all of one
    class without a name; what is wrong with the rest, by path below the folder; and what is left out.

    Raises:
        DataError: it is not a folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one with images.")
    try:
        found = tree(folder)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be used: {error.strerror}.") from error
    files = [ImageFile(path, 0, entry.length, entry.mtime_ns) for path, entry in found.files.items()]
    sizes = [_size(header, max_pixels) for header in probe_all([folder / file.path for file in files])]
    valid = [(file, size) for file, size in zip(files, sizes, strict=True) if isinstance(size, tuple)]
    problems = {file.path: reason for file, reason in zip(files, sizes, strict=True) if isinstance(reason, str)}
    return DatasetIndex(folder, ("",), _table(valid)), found.problems | problems, found.ignored


def _holds_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() for entry in entries)


def _refuse(split: Path, problems: list[str], count: int) -> None:
    if problems:
        raise DataError(
            f"{len(problems)} of {count} files in {split} cannot be used:\n  "
            + listed(problems, "\n  ")
            + "\nReplace or remove them, then start again."
        )


def _index(
    root: Path, split: str, classes: tuple[str, ...], listing: Listing, cache: Path, max_pixels: int
) -> tuple[DatasetIndex, list[str]]:
    """The index of the valid files, and a line on each of the others."""
    cached = cache / f"{split}-{hashlib.sha256(os.fsencode(root / split)).hexdigest()[:16]}-{_CACHE}.parquet"
    known, images = _known_sizes(cached), listing.images
    found: list[tuple[int, int] | Header | str | None] = [known.get((i.path, i.length, i.mtime_ns)) for i in images]
    new = [i for i, known_size in enumerate(found) if known_size is None]
    for i, probed in zip(new, probe_all([root / images[i].path for i in new]), strict=True):
        found[i] = probed
    sizes = [_size(one, max_pixels) for one in found]
    valid = [(image, size) for image, size in zip(images, sizes, strict=True) if isinstance(size, tuple)]
    problems = [f"{path}: {reason}" for path, reason in listing.problems.items()]
    problems += [f"{image.path}: {size}" for image, size in zip(images, sizes, strict=True) if isinstance(size, str)]
    index = DatasetIndex(root, classes, _table(valid))
    if new:
        _save(index, cached)  # before the problems are told, so that the next start looks at the fixed files alone
    return index, problems


def _save(index: DatasetIndex, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        index.save(file)
    except OSError as error:
        raise DataError(
            f"the index of {index.root} cannot be saved in {file.parent}: {error.strerror or error}. "
            f"Set run.output to a folder that can be written."
        ) from error


def _table(images: Sequence[tuple[ImageFile, tuple[int, int]]]) -> pa.Table:
    return table_of(
        {
            "path": [image.path for image, _ in images],
            "length": [image.length for image, _ in images],
            "label": [image.label for image, _ in images],
            "width": [size[0] for _, size in images],
            "height": [size[1] for _, size in images],
            "mtime_ns": [image.mtime_ns for image, _ in images],
        }
    )


def _size(found: Header | tuple[int, int] | str | None, max_pixels: int) -> tuple[int, int] | str:
    """Width and height of a file that is used, or what is wrong with it."""
    if found is None or isinstance(found, str):
        return found or "was not looked at"
    width, height = (found.width, found.height) if isinstance(found, Header) else found
    try:
        check_size(width, height, max_pixels)
    except TooLarge as error:
        return str(error)
    return width, height


def _known_sizes(file: Path) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Sizes by (path, length, time) from an earlier index; a file that is not one counts for nothing."""
    if not file.is_file():
        return {}
    try:
        table = load_table(file)
    except DataError:
        return {}
    rows = zip(*(table[name].to_pylist() for name in ("path", "length", "mtime_ns", "width", "height")), strict=True)
    return {(path, length, mtime_ns): (width, height) for path, length, mtime_ns, width, height in rows}


def probe_all(paths: Sequence[Path]) -> list[Header | str]:
    """What `probe` says of each file, in order."""
    slices = [paths[start : start + _TOGETHER] for start in range(0, len(paths), _TOGETHER)]
    with quiet(), ThreadPoolExecutor() as pool:
        return [found for part in pool.map(lambda s: [probe(path) for path in s], slices) for found in part]


def probe(path: Path) -> Header | str:
    """An image file's header, or what is wrong with it; only the head and the tail are read, nothing is decoded."""
    try:
        with path.open("rb") as file:
            start = file.read(HEAD)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            end = file.read()
            try:
                return header(start, end)
            except NotAnImage as error:
                if size <= HEAD or "corrupt head" not in str(error):
                    return str(error)
            file.seek(0)
            return header(file.read(), end)  # its size lies beyond large embedded profiles or thumbnails
    except NotAnImage as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
