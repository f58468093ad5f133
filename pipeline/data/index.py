"""The index of a split: each sample's file, byte offset and length, label, image size and checksum.

The samplers need all widths and heights; the readers need file, offset and length. An index is a Parquet file next to
the data (see `pipeline.data.dataset`), or is created from class folders at the start of a run (see
`pipeline.data.folders`).
"""

import hashlib
import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.files import File, Files, Opener
from pipeline.data.images import TAIL, format_problem
from pipeline.errors import CorruptSample, DataError
from pipeline.files import atomic_file

SCHEMA = pa.schema(
    [
        ("path", pa.dictionary(pa.int32(), pa.string())),  # below the root: an image, or the shard that contains it
        ("name", pa.string()),  # of a sample in a shard: its name in the source
        ("offset", pa.int64()),  # bytes
        ("length", pa.int64()),  # bytes
        ("label", pa.int32()),
        ("width", pa.int32()),  # pixels as stored, EXIF orientation not applied
        ("height", pa.int32()),
        ("crc32", pa.uint32()),  # of the sample's bytes
        ("mtime_ns", pa.int64()),  # of an image's file, when the index serves as a cache
    ]
)


_ADVICE = (
    "Replace or remove it and start again; `densenet data verify` finds all such images, and "
    "data.on_corrupt=skip replaces them with other samples in training."
)


@dataclass(frozen=True)
class Shard:
    """A shard's size in bytes and its SHA-256."""

    bytes: int
    sha256: str


class DatasetIndex:
    """One split of a data set below `root`; `table` has the columns of `SCHEMA`.

    `classes` are the training classes; a label is an index into them. Samples of one shard are contiguous. `shards` has
    each shard's size and hash by path (empty for class folders).
    """

    def __init__(
        self,
        root: Path,
        classes: tuple[str, ...],
        table: pa.Table,
        shards: dict[str, Shard] | None = None,
        opener: Opener | None = None,
    ) -> None:
        self.root, self.classes, self.table, self.shards = root, classes, table, shards or {}
        self._shards = opener or Files()

    def __len__(self) -> int:
        return self.table.num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the arguments, without cached values."""
        return DatasetIndex, (self.root, self.classes, self.table, self.shards)

    def with_root(self, root: Path, opener: Opener | None = None) -> "DatasetIndex":
        """Returns an index of the same data below another root; `opener` opens its shards."""
        return DatasetIndex(root, self.classes, self.table, self.shards, opener)

    def subset(self, rows_N: NDArray[np.int64]) -> "DatasetIndex":
        """Returns an index of the samples `rows_N`, in that order."""
        return DatasetIndex(self.root, self.classes, self.table.take(rows_N), self.shards)

    @cached_property
    def labels_N(self) -> NDArray[np.int64]:
        """Labels, int64, in [0, number of classes)."""
        return self._integers("label")

    @cached_property
    def widths_N(self) -> NDArray[np.int64]:
        """Widths as stored, int64, pixels."""
        return self._integers("width")

    @cached_property
    def heights_N(self) -> NDArray[np.int64]:
        """Heights as stored, int64, pixels."""
        return self._integers("height")

    @cached_property
    def files_N(self) -> NDArray[np.int64]:
        """Each sample's file number, int64; files are numbered in order of first appearance."""
        return self._path.indices.to_numpy().astype(np.int64)

    @property
    def files(self) -> list[str]:
        """The paths of all files below the root, in order of first appearance."""
        return self._files

    @cached_property
    def first_rows_S1(self) -> NDArray[np.int64]:
        """The first sample of each shard, and the number of samples, int64."""
        return np.append(self._first_of_file, len(self))

    @cached_property
    def in_shards(self) -> bool:
        """Whether the samples are stored in shards."""
        return self.table["name"].null_count == 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all encoded images."""
        return int(self._lengths_N.sum())

    @cached_property
    def _path(self) -> pa.DictionaryArray:
        path = self.table["path"].combine_chunks()
        if isinstance(path, pa.ChunkedArray):  # pyarrow returns one for no or several dictionaries
            path = path.unify_dictionaries().chunk(0) if path.num_chunks else pa.array([], SCHEMA.field("path").type)
        return path

    @cached_property
    def _files(self) -> list[str]:
        return self._path.dictionary.to_pylist()

    @cached_property
    def _offsets_N(self) -> NDArray[np.int64]:
        return self._integers("offset")

    @cached_property
    def _lengths_N(self) -> NDArray[np.int64]:
        return self._integers("length")

    @cached_property
    def _crc32_N(self) -> NDArray[np.uint32] | None:
        column = self.table["crc32"]
        return None if column.null_count else column.to_numpy()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over classes, paths, offsets, lengths and labels; independent of the root."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        path = self._path.dictionary.take(self._path.indices)
        digest.update(pc.binary_length(path).to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
        digest.update("".join(path.to_pylist()).encode())
        for values_N in (self._offsets_N, self._lengths_N, self.labels_N):
            digest.update(values_N.tobytes())
        return digest.hexdigest()

    def path(self, sample: int) -> Path:
        """Returns the path of a sample's file."""
        return self.root / self._files[self.files_N[sample]]

    def names(self) -> list[str]:
        """Returns all samples' file names, without folders and extensions."""
        paths = self.table["name" if self.in_shards else "path"].to_pylist()
        return [path.rpartition("/")[2].partition(".")[0] for path in paths]

    def describe(self, sample: int) -> str:
        """Describes a sample for messages: its file, and in a shard also its name and byte offset."""
        if not self.in_shards:
            return str(self.path(sample))
        name = self.table["name"][int(sample)].as_py()
        return f"{self.path(sample)}, sample {name} at byte {self._offsets_N[sample]}"

    def read(self, sample: int) -> NDArray[np.uint8]:
        """Reads a sample's encoded bytes.

        Raises:
            CorruptSample: the bytes differ from the indexed ones, are not an image, or are a truncated image.
            DataError: the file cannot be read.
        """
        path, offset, length = self.path(sample), int(self._offsets_N[sample]), int(self._lengths_N[sample])
        try:
            if self.in_shards:
                content = self._shards.open(path).read(offset, length)
            else:
                content = File(path).read(offset, length + 1)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        if len(content) != length:
            problem: str | None = f"has changed since it was indexed; {length} bytes were expected"
        elif self._crc32_N is not None and zlib.crc32(content) != self._crc32_N[sample]:
            problem = "does not have the checksum that it was indexed with"
        else:
            problem = format_problem(content[:16], content[-TAIL:])
        if problem:
            raise CorruptSample(f"{self.describe(sample)} {problem}. {_ADVICE}")
        return np.frombuffer(content, np.uint8)

    def find_difference(self, count: int, compare_sizes: bool = True) -> str | None:
        """Checks up to `count` evenly spaced files; returns a message on a missing file or a changed size, or None."""
        total = len(self._files)
        for number in np.unique(np.linspace(0, max(0, total - 1), min(count, total)).astype(np.int64)):
            name = self._files[number]
            try:
                size = (self.root / name).stat().st_size
            except OSError as error:
                return f"{self.root / name}: {error.strerror}"
            expected = self.shards[name].bytes if name in self.shards else None
            if expected is None and not self.in_shards:
                expected = int(self._lengths_N[self._first_of_file[number]])
            if compare_sizes and expected is not None and size != expected:
                return f"{self.root / name} has {size:,} bytes, {expected:,} were indexed"
        return None

    @cached_property
    def _first_of_file(self) -> NDArray[np.int64]:
        return np.unique(self.files_N, return_index=True)[1]

    def save(self, file: Path) -> None:
        """Writes the index as Parquet."""
        save_table(self.table, file)

    def _integers(self, column: str) -> NDArray[np.int64]:
        return self.table[column].to_numpy().astype(np.int64)


def table_of(rows: dict[str, list[Any]]) -> pa.Table:
    """Builds a table with the schema from columns; missing columns are null, missing offsets 0."""
    count = len(rows["path"])
    columns = (
        {"offset": [0] * count} | {field.name: [None] * count for field in SCHEMA if field.name != "offset"} | rows
    )
    return pa.table(
        [
            pa.array(columns[f.name], pa.string()).dictionary_encode()
            if f.name == "path"
            else pa.array(columns[f.name], f.type)
            for f in SCHEMA
        ],
        schema=SCHEMA,
    )


def rows_of(table: pa.Table, start: int, count: int) -> pa.Table:
    """Copies some rows, with paths as plain strings: pickling a slice would pickle the whole table."""
    rows = table.take(np.arange(start, min(start + count, len(table))))
    return rows.set_column(0, "path", rows["path"].cast(pa.string())) if "path" in rows.column_names else rows


def save_table(table: pa.Table, file: Path) -> None:
    """Writes a table as a Parquet file, atomically."""
    with atomic_file(file) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def load_table(file: Path) -> pa.Table:
    """Reads a table in the index's schema.

    Raises:
        DataError: the file is missing, corrupt, or an index of another version.
    """
    try:
        table = pq.read_table(file, read_dictionary=["path"], page_checksum_verification=True)
        table.validate(full=True)
        columns = [f"{field.name} ({field.type})" for field in table.schema]
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist: create the index with `densenet data index`.") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: corrupt column names
        raise DataError(
            f"{file} cannot be read as an index ({str(error).splitlines()[0]}): create it again."
        ) from error
    if not table.schema.equals(SCHEMA):
        raise DataError(f"{file} is not an index of this version: its columns are {', '.join(columns)}.")
    return table
