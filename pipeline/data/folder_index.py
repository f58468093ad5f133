"""Indexes class folders without copying: checks each file's start and end, and caches the result."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config_data import MAX_PIXELS
from pipeline.data.class_names import require_two_classes
from pipeline.data.columns import Columns, folder_columns
from pipeline.data.folders import FolderFiles, Listing, find_splits, list_classes, list_images
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.images import HEAD, TAIL, Header, NotAnImage, TooLarge, check_size, header, ignore_pil_warnings
from pipeline.data.index import DatasetIndex
from pipeline.data.index_file import IndexFile, load_index, save_index
from pipeline.data.label_lists import find_label_lists, is_label_list
from pipeline.data.listing import SYSTEM, tree
from pipeline.data.names import is_csv
from pipeline.data.progress import Progress
from pipeline.data.tables import table_of
from pipeline.errors import DataError, listed

_CACHE_VERSION = 3  # a cached index records which files are valid: increase this when that rule changes
_FILES_PER_TASK = 256  # one task for each of a million files would cost gigabytes
_MAX_BYTES = 2**32 - 1  # of an image


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
        count = len(train_listing)
        if skip_corrupt and problems:
            warn(f"{len(problems)} of {count} training files are skipped:\n  " + listed(problems, "\n  "))
        else:
            _raise_problems(train_folder, problems, count)
        val_index, problems = _index(folder, val, classes, val_listing, cache, max_pixels)
        _raise_problems(val_folder, problems, len(val_listing))
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
    _raise_problems(folder, problems, len(listing))
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
    with ignore_pil_warnings(), ThreadPoolExecutor() as pool:
        probed = list(probe_all((folder / path for path in found.files), pool))
    sizes = [_usable_size(result, max_pixels) for result in probed]
    valid = [(path, size) for path, size in zip(found.files, sizes, strict=True) if isinstance(size, tuple)]
    problems = {path: reason for path, reason in zip(found.files, sizes, strict=True) if isinstance(reason, str)}
    table = table_of(
        {
            "path": [path for path, _ in valid],
            "length": [found.files[path].length for path, _ in valid],
            "label": [0] * len(valid),
            "width": [size[0] for _, size in valid],
            "height": [size[1] for _, size in valid],
        }
    )
    return DatasetIndex.of_table(folder, ("",), table), found.problems | problems, found.ignored


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
    digest = hashlib.sha256(os.fsencode(root / split)).hexdigest()[:16]
    file = cache / f"{split}-{digest}-{_CACHE_VERSION}.arrow"
    cached, any_new = _CachedSizes(file), False
    problems = [f"{path}: {reason}" for path, reason in listing.problems.items()]
    progress = Progress(f"indexing {split}", len(listing))
    valid: list[tuple[FolderFiles, NDArray[np.int32]]] = []
    with ignore_pil_warnings(), ThreadPoolExecutor() as pool:
        for part in listing.folders:
            sizes_F2 = cached.sizes(part)
            unknown = np.flatnonzero(sizes_F2[:, 0] == 0)
            any_new |= len(unknown) > 0
            problem_of = _probe_files(root, part, unknown, sizes_F2, pool) | _too_large(part, sizes_F2, max_pixels)
            problems += [f"{part.folder}{part.names[i].as_py()}: {problem_of[i]}" for i in sorted(problem_of)]
            kept_F = np.ones(len(part), bool)
            kept_F[list(problem_of)] = False
            valid.append((part, sizes_F2) if not problem_of else (part.take(np.flatnonzero(kept_F)), sizes_F2[kept_F]))
            progress.add(len(part))
    columns = _columns(valid)
    if any_new or not cached.are_all(columns, classes):
        _save(columns, classes, root, file)  # even if there are problems: the next start checks only fixed files
    return DatasetIndex.open(root, file), problems


def _columns(valid: Sequence[tuple[FolderFiles, NDArray[np.int32]]]) -> Columns:
    parts = [part for part, _ in valid]
    sizes_N2 = np.concatenate([np.empty((0, 2), np.int32), *(sizes_F2 for _, sizes_F2 in valid)])
    rows = [len(part) for part in parts]
    return folder_columns(
        pa.DictionaryArray.from_arrays(
            np.repeat(np.arange(len(parts), dtype=np.int32), rows),
            pa.array([part.folder for part in parts], pa.large_string()),
        ),
        pa.concat_arrays([pa.array([], pa.large_string()), *(part.names for part in parts)]),
        lengths_N=np.concatenate([np.empty(0, np.uint32), *(part.lengths_F.astype(np.uint32) for part in parts)]),
        labels_N=np.repeat(np.array([part.label for part in parts], np.int32), rows),
        widths_N=np.ascontiguousarray(sizes_N2[:, 0]),
        heights_N=np.ascontiguousarray(sizes_N2[:, 1]),
        mtime_ns_N=np.concatenate([np.empty(0, np.int64), *(part.mtimes_F for part in parts)]),
    )


def _probe_files(
    root: Path, part: FolderFiles, rows: NDArray[np.int64], sizes_F2: NDArray[np.int32], pool: Executor
) -> dict[int, str]:
    """Reads the headers of some files of a folder; writes their sizes into `sizes_F2`, and returns the problems."""
    problem_of: dict[int, str] = {}
    results = probe_all((root / (part.folder + part.names[i].as_py()) for i in rows.tolist()), pool)
    for i, result in zip(rows.tolist(), results, strict=True):
        if isinstance(result, str):
            problem_of[i] = result
        elif part.lengths_F[i] > _MAX_BYTES:
            problem_of[i] = f"has {part.lengths_F[i]:,} bytes, more than {_MAX_BYTES:,}"
        else:
            sizes_F2[i] = result.width, result.height
    return problem_of


def _usable_size(result: Header | str, max_pixels: int) -> tuple[int, int] | str:
    """Returns width and height of a valid file, or the problem."""
    if isinstance(result, str):
        return result
    try:
        check_size(result.width, result.height, max_pixels)
    except TooLarge as error:
        return str(error)
    return result.width, result.height


def _too_large(part: FolderFiles, sizes_F2: NDArray[np.int32], max_pixels: int) -> dict[int, str]:
    """Returns the problems of images with more pixels than the limit."""
    problem_of = {}
    for i in np.flatnonzero(sizes_F2.astype(np.int64).prod(axis=1) > max_pixels).tolist():
        try:
            check_size(int(sizes_F2[i, 0]), int(sizes_F2[i, 1]), max_pixels)
        except TooLarge as error:
            problem_of[i] = str(error)
    return problem_of


class _CachedSizes:
    """The image sizes in a cached index; none if the file is missing or invalid."""

    def __init__(self, file: Path) -> None:
        self._index: IndexFile | None = None
        with suppress(DataError):
            self._index = load_index(file) if file.is_file() else None
        files = self._index.columns.files if self._index else ()
        self._run_of = {folder: run for run, folder in enumerate(files)}

    def sizes(self, part: FolderFiles) -> NDArray[np.int32]:
        """Returns width and height of a folder's files with the same name, length and mtime; 0 for others: [F, 2]."""
        sizes_F2 = np.zeros((len(part), 2), np.int32)
        run = self._run_of.get(part.folder)
        if self._index is None or run is None:
            return sizes_F2
        c = self._index.columns
        assert c.mtime_ns_N is not None
        rows = slice(*c.first_rows_S1[run : run + 2].tolist())
        positions = {name: i for i, name in enumerate(c.all_names[rows].to_pylist())}
        found_F = np.array([positions.get(name, -1) for name in part.names.to_pylist()])
        same_F = (found_F >= 0) & (c.lengths_N[rows][found_F] == part.lengths_F)
        same_F &= c.mtime_ns_N[rows][found_F] == part.mtimes_F
        sizes_F2[same_F] = np.stack([c.widths_N[rows], c.heights_N[rows]], axis=1)[found_F[same_F]]
        return sizes_F2

    def are_all(self, columns: Columns, classes: tuple[str, ...]) -> bool:
        """Whether the file has these rows and classes, if the sizes are known to be equal."""
        if self._index is None or self._index.classes != classes or self._index.columns.files != columns.files:
            return False
        cached = self._index.columns
        return np.array_equal(cached.labels_N, columns.labels_N) and cached.all_names.equals(columns.all_names)


def _save(columns: Columns, classes: tuple[str, ...], root: Path, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_index(columns, classes, file)
    except OSError as error:
        raise DataError(
            f"the index of {root} cannot be saved in {file.parent}: {error.strerror or error}. "
            f"Set run.output to a writable folder."
        ) from error


def probe_all(paths: Iterable[Path], pool: Executor) -> Iterator[Header | str]:
    """Runs `probe` on each file in the pool's threads; yields the results in order."""
    for results in pool.map(lambda batch: [probe(path) for path in batch], _batches(paths)):
        yield from results


def _batches(paths: Iterable[Path]) -> Iterator[list[Path]]:
    iterator = iter(paths)
    while batch := list(islice(iterator, _FILES_PER_TASK)):
        yield batch


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
