"""Tables of samples in memory, in which the offline tools scan, write and compare data sets."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
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


def table_of(rows: dict[str, Any]) -> pa.Table:
    """Builds a table with the schema from columns (lists or arrays); missing columns are null, missing offsets 0."""
    count = len(rows["path"])
    columns = {
        "offset": np.zeros(count, np.int64),
        **{field.name: pa.nulls(count, field.type) for field in SCHEMA if field.name not in ("path", "offset")},
        **rows,
    }
    return pa.table([_column(columns[field.name], field) for field in SCHEMA], schema=SCHEMA)


def _column(values: Any, field: pa.Field) -> Any:
    if field.name == "path":
        values = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, pa.string())
        return values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, field.type)


def class_counts(table: pa.Table, num_classes: int) -> list[int]:
    """Returns each class's number of samples."""
    return np.bincount(table["label"].to_numpy(), minlength=num_classes).tolist()


def rows_of(table: pa.Table, start: int, count: int) -> pa.Table:
    """Copies some rows, with paths as plain strings: pickling a slice would pickle the whole table."""
    rows = table.take(np.arange(start, min(start + count, len(table))))
    return rows.set_column(0, "path", rows["path"].cast(pa.string())) if "path" in rows.column_names else rows


def save_table(table: pa.Table, file: Path) -> None:
    """Writes a table as a Parquet file, atomically."""
    with atomic_file(file) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def load_table(file: Path) -> pa.Table:
    """Reads a table in the schema.

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
