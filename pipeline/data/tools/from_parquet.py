"""Hugging Face's Parquet files as a source: an image's bytes cannot be read by themselves there, so they are spooled.

Each file becomes one plain file of its images, one after another, in the working folder; that takes as much space
again as the source until the preparation has ended.
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
from pipeline.data.tools.scan import Found, Scan, by_number, split_files
from pipeline.errors import DataError
from pipeline.files import write_text

_ROWS = 128  # read together: some 15 MB of ImageNet
_LABELS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class _Columns:
    """The image column and the label column of a file, and the classes' names where its metadata tells them."""

    image: str
    label: str
    class_names: tuple[str, ...] | None
    unused: tuple[str, ...]


def scan_parquet(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Files with a struct column that holds the image's `bytes`, and a label column."""
    if work is None:
        raise DataError(f"{root} holds Parquet files: make a data set of them first, with `densenet data prepare`.")
    ignored = IgnoredFiles()
    files = split_files(root, "parquet", ignored)
    columns = {file: _columns(file) for of_split in files.values() for file in of_split}
    first_file, first = next(iter(columns.items()))
    for file, of_file in columns.items():
        if (of_file.label, of_file.class_names) != (first.label, first.class_names):
            raise DataError(
                f"{first_file} and {file} differ in their label column ({first.label}, {of_file.label}) or in its "
                f"class names: equal labels would mean different classes."
            )
        for name in of_file.unused:
            ignored.add(f"columns named {name}", str(file.relative_to(root)))
    spool = work / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    todo = [file for file in columns if not _spooled(spool, root, file).is_file()]
    check_space(spool, sum(file.stat().st_size for file in todo), "images spooled from Parquet files")
    pool.map(_spool, [(root, file, spool, columns[file]) for file in todo], "spooling")
    images = {split: [row for file in f for row in _rows(spool, root, file)] for split, f in files.items()}
    classes, tables = by_number(images, first.class_names, root)
    return Scan("parquet", spool, classes, tables, ignored=ignored)


def _columns(file: Path) -> _Columns:
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}): copy it again.") from error
    images = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    labels = [name for name in _LABELS if name in schema.names and pa.types.is_integer(schema.field(name).type)]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{file} must have one struct column with the field `bytes`, and one integer column with the label, named "
            f"{' or '.join(_LABELS)}; its columns are {', '.join(f'{field.name}: {field.type}' for field in schema)}."
        )
    unused = tuple(name for name in schema.names if name not in (images[0], labels[0]))
    return _Columns(images[0], labels[0], _class_names(schema.metadata or {}, labels[0]), unused)


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(to_nfc(name) for name in names) if names else None


def _spooled(spool: Path, root: Path, file: Path) -> Path:
    """The list of a file's images, written when they are all spooled; a changed file gets another."""
    stat = file.stat()
    name = str(file.relative_to(root)).replace(os.sep, "_")
    return spool / f"{name}.{stat.st_size}.{stat.st_mtime_ns}.json"


def _spool(task: tuple[Path, Path, Path, _Columns]) -> None:
    root, file, spool, columns = task
    rows: list[Any] = []
    record = _spooled(spool, root, file)
    images = record.with_suffix(".bin")
    with images.open("wb") as out:
        for batch in pq.ParquetFile(file).iter_batches(_ROWS, columns=[columns.image, columns.label]):
            for image, label in zip(batch[columns.image].to_pylist(), batch[columns.label].to_pylist(), strict=True):
                row = f"{file}, row {len(rows)}"
                if label is None:
                    raise DataError(f"{row}: the label is missing.")
                if not image or not image["bytes"]:
                    raise DataError(f"{row}: the image's bytes are missing.")
                name = image.get("path") or f"{record.stem.partition('.')[0]}-{len(rows):06d}.jpg"
                rows.append((label, name, out.tell(), len(image["bytes"])))
                out.write(image["bytes"])
        if len(rows) != (told := pq.read_metadata(file).num_rows):
            raise DataError(f"{file} says that it has {told} rows, {len(rows)} are there: copy it again.")
        out.flush()
        os.fsync(out.fileno())
    write_text(record, json.dumps(rows))


def _rows(spool: Path, root: Path, file: Path) -> list[tuple[int, Found]]:
    record = _spooled(spool, root, file)
    rows = json.loads(record.read_text(encoding="utf-8"))
    path = record.with_suffix(".bin").name
    return [(label, Found(name, path, offset, length)) for label, name, offset, length in rows]
