"""The columns of an index: one array per property of a sample, in memory or mapped from an index file.

Samples of one shard or class folder are consecutive, so paths are stored once per run of rows.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.tables import table_of
from pipeline.errors import DataError

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]

COLUMNS = {  # attribute: name in index files and tables, dtype
    "offsets_N": ("offset", np.int64),
    "lengths_N": ("length", np.uint32),
    "labels_N": ("label", np.int32),
    "widths_N": ("width", np.int32),
    "heights_N": ("height", np.int32),
    "crc32_N": ("crc32", np.uint32),
    "mtime_ns_N": ("mtime_ns", np.int64),
}
NAMES_GROUP = 1 << 14  # rows of a group in a file of names, the unit of reading
_EMPTY = pa.scalar("", pa.large_string())
_CHUNK = 1 << 20  # rows: bounds the memory of passes over all samples


@dataclass(frozen=True)
class Summary:
    """What the start of a run must know of a split; an index file has it, so that opening one reads no column.

    Attributes:
        fingerprint: SHA-256 over classes, paths, offsets, lengths and labels; independent of the root.
        bytes: Of all encoded images.
        largest_pixels: Pixels of the largest image.
        counts_K: Samples of each class.
    """

    fingerprint: str
    bytes: int
    largest_pixels: int
    counts_K: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Columns:
    """The columns of N samples in S runs: shards, or folders of image files.

    Attributes:
        files: Paths below the data set's root: shards, or folders with a slash at the end (an empty text: the root).
        first_rows_S1: int64; `files[s]` has the rows from `first_rows_S1[s]` to `first_rows_S1[s + 1] - 1`.
        offsets_N: int64, bytes in the shard; None for files in folders.
        lengths_N: uint32, bytes.
        labels_N: int32.
        widths_N: int32, pixels as stored, EXIF orientation not applied.
        heights_N: int32, pixels.
        crc32_N: uint32, of the sample's bytes; None if unknown.
        mtime_ns_N: int64, nanoseconds, of an image's file in a cached index; None otherwise.
        names: Large strings: file names in their folders, or the names in the source of the samples in shards; None if
            they are in `names_file`.
        names_file: Parquet file of the names.
    """

    files: tuple[str, ...]
    first_rows_S1: Int64s = field(repr=False)
    offsets_N: Int64s | None = field(default=None, repr=False)
    lengths_N: NDArray[np.uint32] = field(repr=False)
    labels_N: Int32s = field(repr=False)
    widths_N: Int32s = field(repr=False)
    heights_N: Int32s = field(repr=False)
    crc32_N: NDArray[np.uint32] | None = field(default=None, repr=False)
    mtime_ns_N: Int64s | None = field(default=None, repr=False)
    names: pa.Array | None = field(default=None, repr=False)
    names_file: Path | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def in_shards(self) -> bool:
        """Whether the samples are stored in shards."""
        return self.offsets_N is not None

    @property
    def nbytes(self) -> int:
        """Bytes in memory or of the mapped file."""
        return sum(array.nbytes for array in self.arrays().values()) + (self.names.nbytes if self.names else 0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the arrays that exist, by attribute."""
        arrays = {name: getattr(self, name) for name in COLUMNS}
        return {name: array for name, array in arrays.items() if array is not None}

    def file_of(self, sample: int) -> str:
        """Returns the path of a sample's file below the root."""
        file = self.files[np.searchsorted(self.first_rows_S1, sample, side="right") - 1]
        return file if self.in_shards else file + self.name_of(sample)

    def name_of(self, sample: int) -> str:
        """Returns a sample's file name in its folder, or its name in the source of its shard."""
        if self.names is not None:
            return self.names[sample].as_py()
        with pq.ParquetFile(self.names_file) as names:
            group, row = divmod(sample, NAMES_GROUP)
            return names.read_row_group(group)["name"][row].as_py()

    @cached_property
    def all_names(self) -> pa.Array:
        """The names of all samples, large strings; reads them from their file."""
        if self.names is not None:
            return self.names
        return _combined(pq.read_table(self.names_file)["name"]).cast(pa.large_string())

    def all_paths(self) -> Iterator[pa.Array]:
        """Yields the paths of the samples' files below the root as large strings, a chunk of rows at a time."""
        files = pa.array(self.files, pa.large_string())
        for start in range(0, len(self), _CHUNK):
            rows_N = np.arange(start, min(start + _CHUNK, len(self)))
            path = files.take(pa.array(self._runs(rows_N)))
            if not self.in_shards:
                path = pc.binary_join_element_wise(path, self.all_names[start : start + _CHUNK], _EMPTY)
            yield path

    def take(self, rows_N: Int64s) -> "Columns":
        """Returns copies of the rows `rows_N`, in that order."""
        files, first_rows_S1 = _run_lengths(self._runs(rows_N), self.files)
        arrays: Any = {name: array[rows_N] for name, array in self.arrays().items()}
        return Columns(files=files, first_rows_S1=first_rows_S1, names=self.all_names.take(pa.array(rows_N)), **arrays)

    def to_table(self) -> pa.Table:
        """Returns a table in `pipeline.data.tables.SCHEMA`."""
        arrays: dict[str, Any] = {COLUMNS[name][0]: array for name, array in self.arrays().items()}
        if not self.in_shards:
            paths = _combined(pa.chunked_array(self.all_paths(), pa.large_string())).cast(pa.string())
            return table_of(
                {"path": pa.DictionaryArray.from_arrays(np.arange(len(self), dtype=np.int32), paths)} | arrays
            )
        runs_N = np.repeat(np.arange(len(self.files), dtype=np.int32), np.diff(self.first_rows_S1))
        paths = pa.DictionaryArray.from_arrays(runs_N, pa.array(self.files, pa.string()))
        names = [self.all_names[i : i + _CHUNK].cast(pa.string()) for i in range(0, len(self), _CHUNK)]
        return table_of({"path": paths, "name": pa.chunked_array(names, pa.string())} | arrays)

    def summarize(self, classes: Sequence[str]) -> Summary:
        """Computes the summary, in one pass over all samples."""
        lowest, highest = (int(self.labels_N.min()), int(self.labels_N.max())) if len(self) else (0, 0)
        if lowest < 0 or highest >= len(classes):
            raise DataError(
                f"the index has labels from {lowest} to {highest} for {len(classes)} classes: create it again."
            )
        pixels, counts_K = 0, np.zeros(len(classes), np.int64)
        for start in range(0, len(self), _CHUNK):
            part = slice(start, start + _CHUNK)
            pixels = max(pixels, int((self.widths_N[part].astype(np.int64) * self.heights_N[part]).max()))
            counts_K += np.bincount(self.labels_N[part], minlength=len(classes))
        size = int(self.lengths_N.sum(dtype=np.int64))
        return Summary(self._fingerprint(classes), size, pixels, tuple(counts_K.tolist()))

    def _fingerprint(self, classes: Sequence[str]) -> str:
        digest = hashlib.sha256(json.dumps(tuple(classes)).encode())
        for path in self.all_paths():
            digest.update(pc.binary_length(path).to_numpy(zero_copy_only=False).astype(np.int64).data)
        for path in self.all_paths():
            digest.update(_bytes_of(path))
        for values_N in (self.offsets_N, self.lengths_N, self.labels_N):
            for start in range(0, len(self), _CHUNK):
                stop = min(start + _CHUNK, len(self))
                part_N = np.zeros(stop - start) if values_N is None else values_N[start:stop]
                digest.update(part_N.astype(np.int64).data)
        return digest.hexdigest()

    def _runs(self, rows_N: Int64s) -> Int64s:
        return np.searchsorted(self.first_rows_S1, rows_N, side="right") - 1


def columns_of(table: pa.Table) -> Columns:
    """Converts a table in `pipeline.data.tables.SCHEMA`."""
    path = _combined(table["path"].unify_dictionaries())
    arrays: Any = {
        attribute: table[name].to_numpy().astype(dtype)
        for attribute, (name, dtype) in COLUMNS.items()
        if not (table[name].null_count and len(table))
    }
    if table["name"].null_count:
        del arrays["offsets_N"]
        return folder_columns(*split_paths(path.dictionary.take(path.indices)), **arrays)
    files, first_rows_S1 = _run_lengths(path.indices.to_numpy(), path.dictionary.to_pylist())
    names = _combined(table["name"].cast(pa.large_string()))
    return Columns(files=files, first_rows_S1=first_rows_S1, names=names, **arrays)


def folder_columns(folders: pa.Array, names: pa.Array, **arrays: Any) -> Columns:
    """Returns the columns of image files, whose folders end in a slash."""
    encoded = folders if pa.types.is_dictionary(folders.type) else folders.dictionary_encode()
    files, first_rows_S1 = _run_lengths(encoded.indices.to_numpy(), tuple(encoded.dictionary.to_pylist()))
    return Columns(files=files, first_rows_S1=first_rows_S1, names=names.cast(pa.large_string()), **arrays)


def split_paths(paths: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Divides paths into folders, with a slash at the end, and file names."""
    return (
        pc.replace_substring_regex(paths, pattern=r"[^/]*\z", replacement=""),
        pc.replace_substring_regex(paths, pattern=r"(?s)\A.*/", replacement=""),
    )


def _run_lengths(values_N: NDArray[Any], files: Sequence[str]) -> tuple[tuple[str, ...], Int64s]:
    """Returns the file of each run of equal values, which are positions in `files`, and the runs' first rows."""
    starts = np.flatnonzero(np.diff(values_N, prepend=-1)).astype(np.int64)
    return tuple(files[i] for i in values_N[starts].tolist()), np.append(starts, len(values_N))


def _combined(column: pa.ChunkedArray) -> pa.Array:
    """Returns a column as one array."""
    if column.num_chunks == 0:
        return pa.array([], column.type)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _bytes_of(texts: pa.Array) -> memoryview:
    """Returns the bytes of all large strings of an array, one after the other."""
    _, offsets, content = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(content or b"")[ends[0] : ends[-1]]
