"""Index files: Arrow IPC files whose columns processes map into memory and share through the page cache.

A sample in a shard takes 28 bytes: offset, length, label, width, height and checksum. The names of the samples in the
source are in a compressed Parquet file, which only messages and tools open.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.columns import COLUMNS, NAMES_GROUP, Columns, Summary
from pipeline.errors import DataError
from pipeline.files import atomic_file

_VERSION = 1
_CHECKED_BYTES = 1 << 28  # reading larger files completely at each start would take seconds
_NAME, _HEADER, _FIRST_ROWS = "name", b"index", b"first_rows"


@dataclass(frozen=True)
class IndexFile:
    """The content of an index file."""

    columns: Columns
    classes: tuple[str, ...]
    summary: Summary


def names_file(file: Path) -> Path:
    """Returns the path of the names that belong to an index file of shards."""
    return file.with_suffix(".names.parquet")


def save_index(columns: Columns, classes: Sequence[str], file: Path) -> Summary:
    """Writes an index file and, for shards, its file of names; returns the summary."""
    summary = columns.summarize(classes)
    arrays = {COLUMNS[name][0]: pa.array(array) for name, array in columns.arrays().items()}
    if columns.in_shards:
        with atomic_file(names_file(file)) as temporary:
            names = pa.table({_NAME: columns.all_names})
            pq.write_table(names, temporary, compression="zstd", row_group_size=NAMES_GROUP, write_page_checksum=True)
    else:
        arrays[_NAME] = columns.all_names
    first_rows = columns.first_rows_S1.tobytes()
    header = {"version": _VERSION, "classes": classes, "files": columns.files, "summary": asdict(summary)}
    header |= {"checksums": {name: _checksum(array) for name, array in arrays.items()}}
    text = json.dumps(header).encode()
    metadata = {_HEADER: text, _FIRST_ROWS: first_rows, b"checksum": str(zlib.crc32(text + first_rows)).encode()}
    batch = pa.record_batch(arrays).replace_schema_metadata(metadata)
    with atomic_file(file) as temporary, pa.ipc.new_file(temporary, batch.schema) as writer:
        writer.write_batch(batch)
    return summary


def load_index(file: Path, check: bool | None = None) -> IndexFile:
    """Maps an index file into memory.

    `check` compares all columns with their checksums; by default, those of files up to 256 MB.

    Raises:
        DataError: the file is missing, corrupt, or an index of another version.
    """
    try:
        with pa.memory_map(str(file)) as source:
            _read_ahead(file)
            reader = pa.ipc.open_file(source)
            batch = reader.get_batch(0) if reader.num_record_batches else None
        metadata = reader.schema.metadata or {}
        text, first_rows = metadata[_HEADER], metadata[_FIRST_ROWS]
        if int(metadata[b"checksum"]) != zlib.crc32(text + first_rows) or batch is None:
            raise ValueError("its header is corrupt")
        header = json.loads(text)
        if header["version"] != _VERSION:
            raise DataError(f"{file} is an index of another version: create it again with `densenet data index`.")
        if check or (check is None and batch.nbytes <= _CHECKED_BYTES):
            batch.validate(full=True)
            if {name: _checksum(batch[name]) for name in batch.schema.names} != header["checksums"]:
                raise ValueError("its columns are corrupt")
        summary = Summary(**header["summary"] | {"counts_K": tuple(header["summary"]["counts_K"])})
        arrays: Any = {a: batch[n].to_numpy() for a, (n, _) in COLUMNS.items() if n in batch.schema.names}
        columns = Columns(
            files=tuple(header["files"]),
            first_rows_S1=np.frombuffer(first_rows, np.int64),
            names=batch[_NAME] if _NAME in batch.schema.names else None,
            names_file=names_file(file),
            **arrays,
        )
        return IndexFile(columns, tuple(header["classes"]), summary)
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist: create the index with `densenet data index`.") from error
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file} cannot be read as an index ({reason}): create it again.") from error


def _checksum(array: pa.Array) -> int:
    """Returns the CRC-32 of an array's values; Arrow's own files have no checksums."""
    checksum = zlib.crc32(str(array.type).encode())
    for buffer in array.buffers()[1:]:
        checksum = zlib.crc32(memoryview(buffer), checksum)
    return checksum


def _read_ahead(file: Path) -> None:
    """Asks the kernel to read a file, so that random access to its mapped columns does not wait for single pages."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
