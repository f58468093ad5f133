"""Hugging Face's Parquet files as a source.

Parquet allows no random access to a single image, so images are spooled: each Parquet file becomes one plain file of
concatenated images in the working folder. This takes as much disk space as the source until the preparation ends.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.class_names import to_nfc
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.space import check_space
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import ImageLocation, Scan, find_split_files, tables_by_label_number
from pipeline.errors import DataError
from pipeline.files import write_text

_BATCH_ROWS = 128  # about 15 MB of ImageNet
_LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class _Columns:
    """The image column and the label column of a file, and the class names if its metadata has them."""

    image: str
    label: str
    class_names: tuple[str, ...] | None
    unused: tuple[str, ...]


def scan_parquet(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Scans Parquet files that have a struct column with the image's `bytes`, and a label column."""
    if work is None:
        raise DataError(f"{root} contains Parquet files: convert them first with `densenet data prepare`.")
    ignored = IgnoredFiles()
    files = find_split_files(root, "parquet", ignored)
    columns = {file: _columns(file) for split_files in files.values() for file in split_files}
    first_file, first = next(iter(columns.items()))
    for file, file_columns in columns.items():
        if (file_columns.label, file_columns.class_names) != (first.label, first.class_names):
            raise DataError(
                f"{first_file} and {file} differ in their label column ({first.label}, {file_columns.label}) or in its "
                f"class names: equal labels would mean different classes."
            )
        for name in file_columns.unused:
            ignored.add(f"columns named {name}", str(file.relative_to(root)))
    spool = work / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    pending = [file for file in columns if not _spool_record(spool, root, file).is_file()]
    check_space(spool, sum(file.stat().st_size for file in pending), "images spooled from Parquet files")
    pool.map(_spool, [(root, file, spool, columns[file]) for file in pending], "spooling")
    images = {split: [row for file in f for row in _spooled_rows(spool, root, file)] for split, f in files.items()}
    classes, tables = tables_by_label_number(images, first.class_names, root)
    return Scan("parquet", spool, classes, tables, ignored=ignored)


def _columns(file: Path) -> _Columns:
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}): copy it again.") from error
    images = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    labels = [name for name in _LABEL_COLUMNS if name in schema.names and pa.types.is_integer(schema.field(name).type)]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{file} must have one struct column with the field `bytes`, and one integer column with the label, named "
            f"{' or '.join(_LABEL_COLUMNS)}; its columns are "
            f"{', '.join(f'{field.name}: {field.type}' for field in schema)}."
        )
    unused = tuple(name for name in schema.names if name not in (images[0], labels[0]))
    return _Columns(images[0], labels[0], _class_names(schema.metadata or {}, labels[0]), unused)


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(to_nfc(name) for name in names) if names else None


def _spool_record(spool: Path, root: Path, file: Path) -> Path:
    """Returns the path of the list of a file's images, written after all are spooled.

    It depends on the file's size and modification time, so that a changed file is spooled again.
    """
    stat = file.stat()
    name = str(file.relative_to(root)).replace(os.sep, "_")
    return spool / f"{name}.{stat.st_size}.{stat.st_mtime_ns}.json"


def _spool(task: tuple[Path, Path, Path, _Columns]) -> None:
    root, file, spool, columns = task
    rows: list[Any] = []
    record = _spool_record(spool, root, file)
    images = record.with_suffix(".bin")
    with images.open("wb") as out:
        for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=[columns.image, columns.label]):
            for image, label in zip(batch[columns.image].to_pylist(), batch[columns.label].to_pylist(), strict=True):
                row = f"{file}, row {len(rows)}"
                if label is None:
                    raise DataError(f"{row}: the label is missing.")
                if not image or not image["bytes"]:
                    raise DataError(f"{row}: the image's bytes are missing.")
                name = image.get("path") or f"{record.stem.partition('.')[0]}-{len(rows):06d}.jpg"
                rows.append((label, name, out.tell(), len(image["bytes"])))
                out.write(image["bytes"])
        if len(rows) != (expected := pq.read_metadata(file).num_rows):
            raise DataError(f"{file} has {len(rows)} rows, but its metadata names {expected}: copy it again.")
        out.flush()
        os.fsync(out.fileno())
    write_text(record, json.dumps(rows))


def _spooled_rows(spool: Path, root: Path, file: Path) -> list[tuple[int, ImageLocation]]:
    record = _spool_record(spool, root, file)
    rows = json.loads(record.read_text(encoding="utf-8"))
    path = record.with_suffix(".bin").name
    return [(label, ImageLocation(name, path, offset, length)) for label, name, offset, length in rows]
