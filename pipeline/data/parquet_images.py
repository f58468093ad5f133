"""Images in Parquet files, as Hugging Face writes them: a struct column with the images' `bytes`, and a label column.

An image in a Parquet file is no range of bytes: pages are compressed, and one image takes its whole row group. So a
Parquet file is read once, in order, and its images are written to a plain file one after the other: "unpacked". In an
index and in a node's cache, the unpacked `PATH.parquet` is the shard `PATH.parquet.images`.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.class_names import to_nfc
from pipeline.data.columns import Int64s
from pipeline.data.hashed_file import Copied, HashedFile
from pipeline.errors import DataError

UNPACKED = ".parquet.images"
_SUFFIX = ".images"
_BATCH_ROWS = 32  # about 4 MB of ImageNet
_BLOCK = 8 << 20  # bytes, of a read; the stores' defaults are up to 50 MB
_LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class ImageColumns:
    """The image column and the label column of a file, and the class names if its metadata has them."""

    image: str
    label: str
    class_names: tuple[str, ...] | None
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Unpacked:
    """The rows of an unpacked file, in order.

    Attributes:
        names: Each image's name in the source, or `FILE-000007.jpg`, with the row's number.
        offsets_N: Of the images in the unpacked file, int64, bytes.
        lengths_N: int64, bytes.
        labels_N: The label column's numbers, int64.
    """

    names: list[str]
    offsets_N: Int64s
    lengths_N: Int64s
    labels_N: Int64s


def unpacked_name(path: str) -> str:
    """Returns the name of the shard with the images of a Parquet file."""
    return path + _SUFFIX


def parquet_name(shard: str) -> str | None:
    """Returns the Parquet file that contains a shard's images; None for other shards."""
    return shard.removesuffix(_SUFFIX) if shard.endswith(UNPACKED) else None


def open_parquet(stream: Any, where: str) -> pq.ParquetFile:
    """Opens a Parquet file, a path or an open file; `where` names it in errors.

    Raises:
        DataError: it is not a Parquet file.
    """
    with _parquet_errors(where):
        # Read in blocks, not with `pre_buffer`, which would read all row groups into memory.
        return pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BLOCK)


@contextlib.contextmanager
def open_parquet_at(files: Any, source: str, where: str) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file of an fsspec file system, as `open_parquet`, and closes it."""
    with files.open(source, "rb", block_size=_BLOCK) as stream, open_parquet(stream, where) as file:
        yield file


def image_columns(schema: pa.Schema, where: str) -> ImageColumns:
    """Finds the image and the label column of a file.

    Raises:
        DataError: there is no such column, or there are several.
    """
    images = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    labels = [name for name in _LABEL_COLUMNS if name in schema.names and pa.types.is_integer(schema.field(name).type)]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{where} must have one struct column with the field `bytes`, and one integer column with the label, named "
            f"{' or '.join(_LABEL_COLUMNS)}; its columns are "
            f"{', '.join(f'{field.name}: {field.type}' for field in schema)}."
        )
    unused = tuple(name for name in schema.names if name not in (images[0], labels[0]))
    return ImageColumns(images[0], labels[0], _class_names(schema.metadata or {}, labels[0]), unused)


def copy_images(files: Any, source: str, target: Path, on_block: Callable[[], None] = lambda: None) -> Copied:
    """Unpacks a Parquet file of an fsspec file system; reads the image column only, one row group at a time.

    Raises:
        DataError: it is not a Parquet file with images.
        DiskError: the images cannot be written.
        Exception: the source cannot be read; each fsspec file system raises its own errors.
    """
    with open_parquet_at(files, source, source) as file, HashedFile(target) as out:
        column = image_columns(file.schema_arrow, source).image
        for first_row, batch in _batches(file, [f"{column}.bytes"], source):
            on_block()
            out.write(_contents(batch[column], first_row, source)[0])
        return out.copied


def unpack(file: pq.ParquetFile, columns: ImageColumns, out: HashedFile, where: str) -> Unpacked:
    """Unpacks an open Parquet file, as `copy_images`, and returns its rows.

    Raises:
        DataError: a label or an image is missing.
    """
    stem = Path(where).stem
    names: list[str] = []
    lengths, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for first_row, batch in _batches(file, [columns.image, columns.label], where):
        label_column = batch[columns.label]
        if label_column.null_count:
            raise DataError(f"{where}, row {first_row + _first_null(label_column)}: the label is missing.")
        labels.append(label_column.cast(pa.int64()).to_numpy())
        content, lengths_B = _contents(batch[columns.image], first_row, where)
        out.write(content)
        lengths.append(lengths_B)
        names += _names(batch[columns.image], first_row, stem)
    if len(names) != file.metadata.num_rows:
        raise DataError(
            f"{where} has {len(names)} rows, but its metadata names {file.metadata.num_rows}: copy it again."
        )
    lengths_N = np.concatenate(lengths)
    return Unpacked(names, np.cumsum(lengths_N) - lengths_N, lengths_N, np.concatenate(labels))


def _batches(file: pq.ParquetFile, columns: list[str], where: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields batches of rows, and the number of the first row of each."""
    row, batches = 0, file.iter_batches(_BATCH_ROWS, columns=columns)
    while True:
        with _parquet_errors(where):
            batch = next(batches, None)
        if batch is None:
            return
        yield row, batch
        row += len(batch)


def _contents(images: pa.StructArray, first_row: int, where: str) -> tuple[memoryview, Int64s]:
    """Returns the bytes of all images of a batch, one after the other, and each one's length."""
    content = pc.struct_field(images, "bytes").cast(pa.large_binary())  # null where the struct is null
    lengths_B = pc.fill_null(pc.binary_length(content), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if not lengths_B.all():
        raise DataError(f"{where}, row {first_row + int(np.argmin(lengths_B))}: the image's bytes are missing.")
    _, offsets, values = content.buffers()
    ends = np.frombuffer(offsets, np.int64)[content.offset : content.offset + len(content) + 1]
    return memoryview(values)[int(ends[0]) : int(ends[-1])], lengths_B


def _names(images: pa.StructArray, first_row: int, stem: str) -> list[str]:
    has_paths = images.type.get_field_index("path") >= 0
    paths = pc.struct_field(images, "path").to_pylist() if has_paths else [None] * len(images)
    return [path or f"{stem}-{first_row + i:06d}.jpg" for i, path in enumerate(paths)]


def _first_null(column: pa.Array) -> int:
    return int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(to_nfc(name) for name in names) if names else None


@contextlib.contextmanager
def _parquet_errors(where: str) -> Iterator[None]:
    """Converts Arrow's errors; those of the file system pass."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise DataError(f"{where} cannot be read as Parquet ({str(error).splitlines()[0]}): copy it again.") from error
