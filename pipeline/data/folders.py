"""Class folders: `ROOT/SPLIT/CLASS/*`, listed, looked at and indexed without being copied."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.config import MAX_PIXELS
from pipeline.data.images import HEAD, TAIL, Header, NotAnImage, TooLarge, check_size, header, quiet
from pipeline.data.index import DatasetIndex, load_table, table_of
from pipeline.errors import DataError, listed

_CLUTTER = {"thumbs.db", "desktop.ini"}
_CACHE = 2  # a cached index tells which files are used, so this changes when other files become so
_TOGETHER = 256  # files that a thread looks at in one go: a task for each of a million files would cost gigabytes


@dataclass(frozen=True)
class ImageFile:
    """A file below the data's root, as the file system describes it."""

    path: str
    label: int
    length: int
    mtime_ns: int


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
            raise DataError(
                f"data.root={root} has no folder '{name}' ({found}): correct data.root or data.{key}, or make a data "
                f"set from archives with `densenet data prepare`."
            )
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
            f"{split.name}/CLASS/*; ImageNet's validation pictures are flat: `densenet data prepare` sorts them."
        )
    classes = tuple(sorted(e.name for e in entries))
    if not classes:
        raise DataError(f"{split} has no class folders: it must hold {split.name}/CLASS/*.")
    return classes


def list_images(split: Path, classes: Sequence[str], train_classes: Sequence[str]) -> list[ImageFile]:
    """All files of a split's class folders in sorted order, labelled by rank in `train_classes`.

    Raises:
        DataError: a class is not among the training classes, is empty, or has folders in it, or a name is not UTF-8.
    """
    labels = {name: label for label, name in enumerate(train_classes)}
    unknown = [name for name in classes if name not in labels]
    if unknown:
        raise DataError(f"{split} has classes that the training split lacks: {listed(unknown)}. Add or remove them.")
    images: list[ImageFile] = []
    empty: list[str] = []
    for name in classes:
        found = list(list_files(split / name, f"{split.name}/{name}", labels[name]))
        if not found:
            empty.append(name)
        images += sorted(found, key=lambda image: image.path)
    if empty:
        raise DataError(f"{split} has class folders without files: {listed(empty)}. Fill or remove them.")
    return images


def list_files(folder: Path, prefix: str, label: int) -> Iterable[ImageFile]:
    """The files of one folder, without what file managers leave behind; `prefix` is the folder's path below the root.

    Raises:
        DataError: there is a folder in it, or a name is not UTF-8.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_clutter(entry.name):
                continue
            if entry.is_dir():
                raise DataError(f"{entry.path} is a folder inside a class folder: only image files may be there.")
            if not is_utf8(entry.path):
                raise DataError(f"{os.fsencode(entry.path)!r} has a name that is not UTF-8: rename the file or folder.")
            stat = entry.stat()
            yield ImageFile(f"{prefix}/{entry.name}", label, stat.st_size, stat.st_mtime_ns)


def scan_splits(
    root: str | None,
    train: str,
    val: str,
    cache: Path,
    skip_damaged: bool,
    warn: Callable[[str], None],
    max_pixels: int = MAX_PIXELS,
) -> tuple[DatasetIndex, DatasetIndex]:
    """Indexes of class folders.

    Files already known to the index in the folder `cache` (same path, length and time) are not opened again. Damaged
    training files, and those of more than `max_pixels`, are left out and told to `warn` with `skip_damaged`; in the
    evaluation split they never are.

    Raises:
        DataError: a folder is missing or is not laid out in class folders, or files are damaged or are no images.
    """
    train_folder, val_folder = find_splits(root, train, val)
    try:
        classes = list_classes(train_folder)
        train_images = list_images(train_folder, classes, classes)
        val_images = list_images(val_folder, list_classes(val_folder), classes)
        folder = train_folder.parent.absolute()
        train_index, faults = _index(folder, train, classes, train_images, cache, max_pixels)
        if skip_damaged and faults:
            warn(f"{len(faults)} of {len(train_images)} training files are left out:\n  " + listed(faults, "\n  "))
        else:
            _refuse(train_folder, faults, len(train_images))
        val_index, faults = _index(folder, val, classes, val_images, cache, max_pixels)
        _refuse(val_folder, faults, len(val_images))
        return train_index, val_index
    except OSError as error:
        raise DataError(f"{error.filename} cannot be used: {error.strerror}.") from error


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
            raise DataError(f"{root} has no split '{split}', it has {listed(list_classes(root))}: correct the name.")
        classes = list_classes(folder)
        images = list_images(folder, classes, classes)
        index, faults = _index(folder.parent.absolute(), folder.name, classes, images, cache, max_pixels)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be used: {error.strerror}.") from error
    _refuse(folder, faults, len(images))
    return index


def scan_pictures(folder: Path, max_pixels: int = MAX_PIXELS) -> tuple[DatasetIndex, dict[str, str]]:
    """All files below a folder, at any depth, in sorted order: an index of the pictures, all of one class without a
    name, and what is wrong with the other files, by path below the folder.

    Raises:
        DataError: it is not a folder, or a name is not UTF-8.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one with pictures.")
    try:
        files = []
        for place, _, names in sorted(os.walk(folder)):
            if not is_utf8(place):
                raise DataError(f"{os.fsencode(place)!r} has a name that is not UTF-8: rename it.")
            prefix = Path(place).relative_to(folder).as_posix()
            there = sorted(name for name in names if not _is_clutter(name))
            for name in there:
                stat = (Path(place) / name).stat()
                path = name if prefix == "." else f"{prefix}/{name}"
                files.append(ImageFile(path, 0, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be used: {error.strerror}.") from error
    found = [_size(header, max_pixels) for header in probe_all([folder / file.path for file in files])]
    sound = [(file, size) for file, size in zip(files, found, strict=True) if isinstance(size, tuple)]
    faults = {file.path: reason for file, reason in zip(files, found, strict=True) if isinstance(reason, str)}
    return DatasetIndex(folder, ("",), _table(sound)), faults


def _holds_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() for entry in entries)


def _refuse(split: Path, faults: list[str], count: int) -> None:
    if faults:
        raise DataError(
            f"{len(faults)} of {count} files in {split} cannot be used:\n  "
            + listed(faults, "\n  ")
            + "\nReplace or remove them, then start again."
        )


def _index(
    root: Path, split: str, classes: tuple[str, ...], images: list[ImageFile], cache: Path, max_pixels: int
) -> tuple[DatasetIndex, list[str]]:
    """The index of the sound files, and a line on each of the others."""
    cached = cache / f"{split}-{hashlib.sha256(os.fsencode(root / split)).hexdigest()[:16]}-{_CACHE}.parquet"
    known = _known_sizes(cached)
    found: list[tuple[int, int] | Header | str | None] = [known.get((i.path, i.length, i.mtime_ns)) for i in images]
    new = [i for i, known_size in enumerate(found) if known_size is None]
    for i, probed in zip(new, probe_all([root / images[i].path for i in new]), strict=True):
        found[i] = probed
    sizes = [_size(one, max_pixels) for one in found]
    sound = [(image, size) for image, size in zip(images, sizes, strict=True) if isinstance(size, tuple)]
    faults = [f"{image.path}: {size}" for image, size in zip(images, sizes, strict=True) if isinstance(size, str)]
    index = DatasetIndex(root, classes, _table(sound))
    if new:
        _save(index, cached)  # before the faults are told, so that the next start looks at the mended files alone
    return index, faults


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
                if size <= HEAD or "damaged head" not in str(error):
                    return str(error)
            file.seek(0)
            return header(file.read(), end)  # its size lies beyond large embedded profiles or thumbnails
    except NotAnImage as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def is_utf8(name: str) -> bool:
    """Whether a name from the file system is text: Python carries other bytes in it as lone surrogates."""
    return name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name)


def _is_clutter(name: str) -> bool:
    """What file managers leave behind, and hidden files."""
    return name.startswith(".") or name.lower() in _CLUTTER
