"""The index of a split: for each sample where its bytes lie, its label and its size.

The plan needs every image's width and height, DALI needs files that it can decode. Both are settled here, once, before
a run: a damaged file is found now and named, not in the middle of an epoch.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.layouts import ImageFile, find_splits, list_classes, list_images
from pipeline.errors import DataError

_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("label", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mtime_ns", pa.int64()),
    ]
)
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # all of these DALI decodes
_PADDING = 4096  # bytes that may follow a JPEG's end marker
_SHOWN = 5


@dataclass(frozen=True)
class DatasetIndex:
    """One split of a data set; rows are in sorted order of the paths.

    `table` has the columns path (below `root`), offset and length (bytes), label, width and height (pixels as stored,
    EXIF orientation not applied) and mtime_ns. `classes` are the training classes, whose rank the labels are.
    """

    root: Path
    classes: tuple[str, ...]
    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def labels_N(self) -> NDArray[np.int64]:
        return self._integers("label")

    @cached_property
    def widths_N(self) -> NDArray[np.int64]:
        return self._integers("width")

    @cached_property
    def heights_N(self) -> NDArray[np.int64]:
        return self._integers("height")

    @cached_property
    def _places(self) -> tuple[pa.ChunkedArray, NDArray[np.int64], NDArray[np.int64]]:
        return self.table["path"].combine_chunks(), self._integers("offset"), self._integers("length")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over classes, paths, lengths and labels: equal for equal data wherever it lies."""
        digest = hashlib.sha256(json.dumps([self.classes, self.table["path"].to_pylist()]).encode())
        for column in ("offset", "length", "label"):
            digest.update(self._integers(column).tobytes())
        return digest.hexdigest()

    def path(self, sample: int) -> Path:
        """The file that holds a sample."""
        return self.root / self._places[0][int(sample)].as_py()

    def read(self, sample: int) -> NDArray[np.uint8]:
        """A sample's encoded bytes.

        Raises:
            DataError: the file has gone, has another length than when it was indexed, or is a JPEG cut short.
        """
        offset, length = int(self._places[1][sample]), int(self._places[2][sample])
        path = self.path(sample)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(length + 1)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        if len(content) != length:
            raise DataError(f"{path} has changed since it was indexed; {length} bytes were expected. Start again.")
        fault = cut_short(content[:16], content[-_PADDING:])
        if fault:
            raise DataError(f"{path} {fault}. Replace or remove it.")
        return np.frombuffer(content, np.uint8)

    def save(self, file: Path) -> None:
        """Writes the index as Parquet, to a temporary name first."""
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        pq.write_table(self.table, temporary)
        temporary.replace(file)

    def _integers(self, column: str) -> NDArray[np.int64]:
        return self.table[column].to_numpy().astype(np.int64)


def open_splits(root: str | None, train: str, val: str, cache: Path) -> tuple[DatasetIndex, DatasetIndex]:
    """Indexes of the training and the evaluation split.

    Files already known to the index in the folder `cache` (same path, length and time) are not opened again.

    Raises:
        DataError: a folder is missing or is not laid out in class folders, or files are damaged or are no images.
    """
    train_folder, val_folder = find_splits(root, train, val)
    try:
        classes = list_classes(train_folder)
        train_index = _index(train_folder, classes, classes, cache)
        return train_index, _index(val_folder, list_classes(val_folder), classes, cache)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be used: {error.strerror}.") from error


def _index(split: Path, classes: Sequence[str], train_classes: tuple[str, ...], cache: Path) -> DatasetIndex:
    images = list_images(split, classes, train_classes)
    cached = cache / f"{split.name}-{hashlib.sha256(str(split.absolute()).encode()).hexdigest()[:16]}.parquet"
    known = _known_sizes(cached)
    sizes: list[Any] = [known.get((image.path, image.length, image.mtime_ns)) for image in images]
    new = [i for i, size in enumerate(sizes) if size is None]
    if new:
        with ThreadPoolExecutor() as pool:
            probed = list(pool.map(lambda i: probe(split / images[i].path), new, chunksize=64))
        faults = [f"  {images[i].path}: {p}" for i, p in zip(new, probed, strict=True) if isinstance(p, str)]
        if faults:
            more = [f"  and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
            raise DataError(
                f"{len(faults)} of {len(images)} files in {split} cannot be used:\n"
                + "\n".join(faults[:_SHOWN] + more)
                + "\nReplace or remove them, then start again."
            )
        sizes_of_new = dict(zip(new, probed, strict=True))
        sizes = [sizes_of_new.get(i, size) for i, size in enumerate(sizes)]
    index = DatasetIndex(split.absolute(), train_classes, _table(images, sizes))
    if new:
        cache.mkdir(parents=True, exist_ok=True)
        index.save(cached)
    return index


def _table(images: Sequence[ImageFile], sizes: Sequence[tuple[int, int]]) -> pa.Table:
    columns = [
        [image.path for image in images],
        [0] * len(images),
        [image.length for image in images],
        [image.label for image in images],
        [width for width, _ in sizes],
        [height for _, height in sizes],
        [image.mtime_ns for image in images],
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)


def _known_sizes(file: Path) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Sizes by (path, length, time) from an earlier index; a file that is not one counts for nothing."""
    if not file.is_file():
        return {}
    try:
        table = pq.read_table(file, columns=["path", "length", "mtime_ns", "width", "height"])
    except (pa.ArrowInvalid, OSError):
        return {}
    rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    return {(path, length, mtime_ns): (width, height) for path, length, mtime_ns, width, height in rows}


def probe(path: Path) -> tuple[int, int] | str:
    """An image file's (width, height) as stored, or what is wrong with it.

    The format is told by the content, never by the name. Only the head and the tail are read, nothing is decoded.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _PADDING))
            end = file.read()
            file.seek(0)
            return cut_short(start, end) or _size(file, start)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def cut_short(start: bytes, end: bytes) -> str | None:
    """Says whether a JPEG or PNG lacks its end mark, from its first and last bytes; padding may follow the mark."""
    if start.startswith(b"\xff\xd8") and b"\xff\xd9" not in end[-_PADDING:]:
        return "is a JPEG that is cut short"
    if start.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" not in end[-_PADDING:]:
        return "is a PNG that is cut short"
    return None


def _size(file: BinaryIO, start: bytes) -> tuple[int, int] | str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF blocks and of large pictures, which are no faults here
            with Image.open(file, formats=_FORMATS) as image:
                return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        seen = f"it begins with {start.decode('latin-1')!r}" if start else "it is empty"
        return f"is not an image of a known format ({', '.join(_FORMATS)}); {seen}"
