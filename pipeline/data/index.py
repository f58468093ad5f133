"""The index of a split: each sample's file, byte offset and length, label, image size and checksum.

The samplers need all widths and heights; the readers need file, offset and length. An index is a file next to the data
(see `pipeline.data.dataset`), or is created from class folders at the start of a run (see `pipeline.data.folders`).
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.columns import Columns, Int32s, Int64s, Summary, columns_of
from pipeline.data.files import File, Files, Opener
from pipeline.data.images import TAIL, format_problem
from pipeline.data.index_file import load_index
from pipeline.errors import CorruptSample, DataError

_ADVICE = (
    "Replace or remove it and start again; `densenet data verify` finds all such images, and "
    "data.on_corrupt=skip replaces them with other samples in training."
)
_PICKLED_BYTES = 1 << 29  # larger indexes are opened by path in other processes


@dataclass(slots=True)  # frozen, a hundred thousand would take a third of a second to create
class Shard:
    """A shard's size in bytes and its SHA-256."""

    bytes: int
    sha256: str


class DatasetIndex:
    """One split of a data set below `root`.

    `classes` are the training classes; a label is an index into them. Samples of one shard are consecutive. `shards`
    has each shard's size and hash by path (empty for class folders). `address` is the folder or URI that has the shards
    if they are not below `root`; then they are readable only in a copy.
    """

    def __init__(
        self,
        root: Path,
        classes: tuple[str, ...],
        columns: Columns,
        shards: dict[str, Shard] | None = None,
        *,
        address: str | None = None,
        file: Path | None = None,
        summary: Summary | None = None,
        opener: Opener | None = None,
    ) -> None:
        self.root, self.classes, self.columns, self.shards = root, classes, columns, shards or {}
        self.address = address
        self._file, self._summary, self._opener = file, summary, opener or Files()

    @classmethod
    def of_table(
        cls,
        root: Path,
        classes: tuple[str, ...],
        table: pa.Table,
        shards: dict[str, Shard] | None = None,
        *,
        address: str | None = None,
    ) -> "DatasetIndex":
        """Returns the index of a table in `pipeline.data.tables.SCHEMA`, in memory."""
        return cls(root, classes, columns_of(table), shards, address=address)

    @classmethod
    def open(
        cls,
        root: Path,
        file: Path,
        shards: dict[str, Shard] | None = None,
        *,
        address: str | None = None,
        check: bool | None = None,
    ) -> "DatasetIndex":
        """Maps an index file into memory; for `check` see `pipeline.data.index_file.load_index`."""
        opened = load_index(file, check)
        columns, summary = opened.columns, opened.summary
        return cls(root, opened.classes, columns, shards, address=address, file=file, summary=summary)

    def __len__(self) -> int:
        return len(self.columns)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the columns, which Ray shares among a node's processes; of a large index file, its path."""
        if self._file is not None and self.columns.nbytes > _PICKLED_BYTES:
            return _reopened, (self.root, self._file, self.shards, self.address, self.fingerprint)
        return _unpickled, (self.root, self.classes, self.columns, self.shards, self.address, self._file, self._summary)

    def with_root(self, root: Path, opener: Opener | None = None) -> "DatasetIndex":
        """Returns an index of the same data below another root; `opener` opens its shards."""
        return DatasetIndex(
            root,
            self.classes,
            self.columns,
            self.shards,
            address=self.address,
            file=self._file,
            summary=self._summary,
            opener=opener,
        )

    def subset(self, rows_N: Int64s) -> "DatasetIndex":
        """Returns an index of the samples `rows_N`, in that order."""
        return DatasetIndex(self.root, self.classes, self.columns.take(rows_N), self.shards, address=self.address)

    def to_table(self) -> pa.Table:
        """Returns a table in `pipeline.data.tables.SCHEMA`."""
        return self.columns.to_table()

    @property
    def labels_N(self) -> Int32s:
        """Labels, int32, in [0, number of classes)."""
        return self.columns.labels_N

    @property
    def widths_N(self) -> Int32s:
        """Widths as stored, int32, pixels."""
        return self.columns.widths_N

    @property
    def heights_N(self) -> Int32s:
        """Heights as stored, int32, pixels."""
        return self.columns.heights_N

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of shards or folders below the root, in the order of their samples."""
        return self.columns.files

    @property
    def first_rows_S1(self) -> Int64s:
        """The first sample in each of `files`, int64; the last entry is the number of samples."""
        return self.columns.first_rows_S1

    @property
    def in_shards(self) -> bool:
        """Whether the samples are stored in shards."""
        return self.columns.in_shards

    @cached_property
    def summary(self) -> Summary:
        """Fingerprint, bytes, largest image and class counts; computed if the index is not from a file."""
        return self._summary or self.columns.summarize(self.classes)

    @property
    def total_bytes(self) -> int:
        """Bytes of all encoded images."""
        return self.summary.bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 over classes, paths, offsets, lengths and labels; independent of the root."""
        return self.summary.fingerprint

    def path(self, sample: int) -> Path:
        """Returns the path of a sample's file."""
        return self.root / self.columns.file_of(sample)

    def names(self) -> list[str]:
        """Returns all samples' file names, without folders and extensions."""
        names = pc.replace_substring_regex(self.columns.all_names, pattern=r"(?s)\A.*/", replacement="")
        return pc.replace_substring_regex(names, pattern=r"(?s)\..*\z", replacement="").to_pylist()

    def describe(self, sample: int) -> str:
        """Describes a sample for messages: its file, and in a shard also its name and byte offset."""
        if self.columns.offsets_N is None:
            return str(self.path(sample))
        name, offset = self.columns.name_of(sample), self.columns.offsets_N[sample]
        return f"{self.path(sample)}, sample {name} at byte {offset}"

    def read(self, sample: int) -> NDArray[np.uint8]:
        """Reads a sample's encoded bytes.

        Raises:
            CorruptSample: the bytes differ from the indexed ones, are not an image, or are a truncated image.
            DataError: the file cannot be read.
        """
        columns = self.columns
        path, length = self.path(sample), int(columns.lengths_N[sample])
        try:
            if columns.offsets_N is not None:
                content = self._opener.open(path).read(int(columns.offsets_N[sample]), length)
            else:
                content = File(path).read(0, length + 1)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        if len(content) != length:
            problem: str | None = f"has changed since it was indexed; {length} bytes were expected"
        elif columns.crc32_N is not None and zlib.crc32(content) != columns.crc32_N[sample]:
            problem = "does not have the checksum that it was indexed with"
        else:
            problem = format_problem(content[:16], content[-TAIL:])
        if problem:
            raise CorruptSample(f"{self.describe(sample)} {problem}. {_ADVICE}")
        return np.frombuffer(content, np.uint8)

    def find_difference(self, count: int, compare_sizes: bool = True) -> str | None:
        """Checks up to `count` evenly spaced files; returns a message on a missing file or a changed size, or None."""
        total = len(self.files) if self.in_shards else len(self)
        for number in np.unique(np.linspace(0, max(0, total - 1), min(count, total)).astype(np.int64)).tolist():
            name = self.files[number] if self.in_shards else self.columns.file_of(number)
            try:
                size = (self.root / name).stat().st_size
            except OSError as error:
                return f"{self.root / name}: {error.strerror}"
            expected = self.shards[name].bytes if name in self.shards else None
            if not self.in_shards:
                expected = int(self.columns.lengths_N[number])
            if compare_sizes and expected is not None and size != expected:
                return f"{self.root / name} has {size:,} bytes, {expected:,} were indexed"
        return None


def _reopened(root: Path, file: Path, shards: dict[str, Shard], address: str | None, fingerprint: str) -> DatasetIndex:
    """Opens a large index by its path, in another process, maybe on another node."""
    index = DatasetIndex.open(root, file, shards, address=address)
    if index.fingerprint != fingerprint:
        raise DataError(
            f"{file} is the index of other data on this node than on the driver's: put it on storage that all "
            f"nodes share."
        )
    return index


def _unpickled(
    root: Path,
    classes: tuple[str, ...],
    columns: Columns,
    shards: dict[str, Shard],
    address: str | None,
    file: Path | None,
    summary: Summary | None,
) -> DatasetIndex:
    return DatasetIndex(root, classes, columns, shards, address=address, file=file, summary=summary)
