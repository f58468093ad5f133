"""Class folders, `ROOT/SPLIT/CLASS/*`: listing, header checks and indexing, without copying."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pipeline.config_data import MAX_PIXELS
from pipeline.data.class_names import check_known_classes, folders_by_class, require_two_classes
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.images import HEAD, TAIL, Header, NotAnImage, TooLarge, check_size, header, ignore_pil_warnings
from pipeline.data.index import DatasetIndex, load_table, table_of
from pipeline.data.label_lists import find_label_lists, is_label_list
from pipeline.data.listing import SYSTEM, entries, printable, tree
from pipeline.data.names import SPLIT_WORDS, is_compressed, is_csv, words_of
from pipeline.errors import DataError, listed

_CACHE_VERSION = 2  # a cached index records which files are valid: increase this when that rule changes
_FILES_PER_TASK = 256  # one task for each of a million files would cost gigabytes


@dataclass(frozen=True)
class ImageFile:
    """A file below the data's root, as the file system describes it."""

    path: str
    label: int
    length: int
    mtime_ns: int


@dataclass
class Listing:
    """A split's files in sorted order; problems of unusable files, by path below the root; ignored files."""

    images: list[ImageFile] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)


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
    """Adds the files of one folder to `listing`; `prefix` is the folder's path below the root.

    Raises:
        DataError: it contains a folder.
    """
    for entry in entries(folder, prefix, listing.ignored):
        if isinstance(entry, tuple):
            listing.problems[f"{prefix}/{entry[0]}"] = entry[1]
        elif entry.is_folder:
            raise DataError(
                f"{printable(entry.path)} is a folder inside a class folder, which may contain only image files. If "
                f"it is the class, and {folder.name} a group of classes, move or link it to {folder.parent}."
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
    """Indexes class folders for training and evaluation.

    Does not open files that the cached index in the folder `cache` has (same path, length and modification time). With
    `skip_corrupt`, skips training files that are corrupt or have more than `max_pixels`, with a warning; in the
    evaluation split they are always errors.

    Raises:
        DataError: a folder is missing or does not contain class folders, or files are corrupt or not images.
    """
    train_folder, val_folder = find_splits(root, train, val)
    try:
        ignored = IgnoredFiles()
        folders = list_classes(train_folder, ignored)
        classes = tuple(folders)
        require_two_classes(classes, train_folder, [n for n in sorted(os.listdir(train_folder.parent)) if is_csv(n)])
        train_listing = list_images(train_folder, folders, classes)
        val_listing = list_images(val_folder, list_classes(val_folder, ignored), classes)
        folder = train_folder.parent.absolute()
        train_index, problems = _index(folder, train, classes, train_listing, cache, max_pixels)
        count = len(train_listing.images) + len(train_listing.problems)
        if skip_corrupt and problems:
            warn(f"{len(problems)} of {count} training files are skipped:\n  " + listed(problems, "\n  "))
        else:
            _raise_problems(train_folder, problems, count)
        val_index, problems = _index(folder, val, classes, val_listing, cache, max_pixels)
        _raise_problems(val_folder, problems, len(val_listing.images) + len(val_listing.problems))
        for file in find_label_lists([train_folder.parent, train_folder, val_folder]):
            if is_label_list(file):
                warn(f"{file} is ignored, labels follow from the class folders: `densenet data prepare` reads it")
        if train != val and train_folder.samefile(val_folder):
            warn(f"{train_folder} and {val_folder} are the same folder: the training images are evaluated")
    except OSError as error:
        raise DataError(f"{error.filename} cannot be used: {error.strerror}.") from error
    ignored.merge(train_listing.ignored)
    ignored.merge(val_listing.ignored)
    for line in ignored.lines(exclude=SYSTEM):
        warn(f"ignored: {line}")
    return train_index, val_index


def scan_split(root: Path, split: str, cache: Path, max_pixels: int = MAX_PIXELS) -> DatasetIndex:
    """Indexes one split's class folders; without such a split, class folders in the root itself.

    Raises:
        DataError: as `scan_splits`.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: use one that contains {split}/CLASS/* or CLASS/*.")
    folder = root / split if (root / split).is_dir() else root
    try:
        if any(entry.is_dir() and _has_subfolders(entry) for entry in folder.iterdir()):
            raise DataError(
                f"{root} has no split '{split}', it has {listed(list(list_classes(root)))}: correct the name."
            )
        classes = list_classes(folder)
        listing = list_images(folder, classes, tuple(classes))
        index, problems = _index(folder.parent.absolute(), folder.name, tuple(classes), listing, cache, max_pixels)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be used: {error.strerror}.") from error
    _raise_problems(folder, problems, len(listing.images) + len(listing.problems))
    return index


def scan_images(folder: Path, max_pixels: int = MAX_PIXELS) -> tuple[DatasetIndex, dict[str, str], IgnoredFiles]:
    """Indexes all files below a folder, at any depth, in sorted order; follows links.

    Returns:
        The index of the images, all in one class with an empty name; the problems of unusable files, by path below the
        folder; and the ignored files.

    Raises:
        DataError: it is not a folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: use one with images.")
    try:
        found = tree(folder)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be used: {error.strerror}.") from error
    files = [ImageFile(path, 0, entry.length, entry.mtime_ns) for path, entry in found.files.items()]
    sizes = [_usable_size(header, max_pixels) for header in probe_all([folder / file.path for file in files])]
    valid = [(file, size) for file, size in zip(files, sizes, strict=True) if isinstance(size, tuple)]
    problems = {file.path: reason for file, reason in zip(files, sizes, strict=True) if isinstance(reason, str)}
    return DatasetIndex(folder, ("",), _table(valid)), found.problems | problems, found.ignored


def _has_subfolders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() for entry in entries)


def _raise_problems(split: Path, problems: list[str], count: int) -> None:
    if problems:
        raise DataError(
            f"{len(problems)} of {count} files in {split} cannot be used:\n  "
            + listed(problems, "\n  ")
            + "\nReplace or remove them, then start again."
        )


def _index(
    root: Path, split: str, classes: tuple[str, ...], listing: Listing, cache: Path, max_pixels: int
) -> tuple[DatasetIndex, list[str]]:
    """Returns the index of the valid files, and a line for each problem."""
    cached = cache / f"{split}-{hashlib.sha256(os.fsencode(root / split)).hexdigest()[:16]}-{_CACHE_VERSION}.parquet"
    known, images = _known_sizes(cached), listing.images
    results: list[tuple[int, int] | Header | str | None] = [known.get((i.path, i.length, i.mtime_ns)) for i in images]
    new = [i for i, known_size in enumerate(results) if known_size is None]
    for i, probed in zip(new, probe_all([root / images[i].path for i in new]), strict=True):
        results[i] = probed
    sizes = [_usable_size(result, max_pixels) for result in results]
    valid = [(image, size) for image, size in zip(images, sizes, strict=True) if isinstance(size, tuple)]
    problems = [f"{path}: {reason}" for path, reason in listing.problems.items()]
    problems += [f"{image.path}: {size}" for image, size in zip(images, sizes, strict=True) if isinstance(size, str)]
    index = DatasetIndex(root, classes, _table(valid))
    if new:
        _save(index, cached)  # before problems are raised, so that the next start checks only the fixed files
    return index, problems


def _save(index: DatasetIndex, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        index.save(file)
    except OSError as error:
        raise DataError(
            f"the index of {index.root} cannot be saved in {file.parent}: {error.strerror or error}. "
            f"Set run.output to a writable folder."
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


def _usable_size(result: Header | tuple[int, int] | str | None, max_pixels: int) -> tuple[int, int] | str:
    """Returns width and height of a valid file, or the problem."""
    if result is None or isinstance(result, str):
        return result or "was not checked"
    width, height = (result.width, result.height) if isinstance(result, Header) else result
    try:
        check_size(width, height, max_pixels)
    except TooLarge as error:
        return str(error)
    return width, height


def _known_sizes(file: Path) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Returns image sizes by (path, length, mtime) from a cached index; empty if the file is missing or invalid."""
    if not file.is_file():
        return {}
    try:
        table = load_table(file)
    except DataError:
        return {}
    rows = zip(*(table[name].to_pylist() for name in ("path", "length", "mtime_ns", "width", "height")), strict=True)
    return {(path, length, mtime_ns): (width, height) for path, length, mtime_ns, width, height in rows}


def probe_all(paths: Sequence[Path]) -> list[Header | str]:
    """Runs `probe` on each file, in threads; returns the results in order."""
    slices = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    with ignore_pil_warnings(), ThreadPoolExecutor() as pool:
        return [result for part in pool.map(lambda s: [probe(path) for path in s], slices) for result in part]


def probe(path: Path) -> Header | str:
    """Reads an image file's header; returns it, or the problem. Reads only the start and the end; decodes nothing."""
    try:
        with path.open("rb") as file:
            start = file.read(HEAD)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            end = file.read()
            try:
                return header(start, end)
            except NotAnImage as error:
                if size <= HEAD or "corrupt header" not in str(error):
                    return str(error)
            file.seek(0)
            return header(file.read(), end)  # the size may come after large embedded profiles or thumbnails
    except NotAnImage as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
