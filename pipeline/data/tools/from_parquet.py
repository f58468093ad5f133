"""Hugging Face's Parquet files as a source.

Parquet allows no random access to a single image, so images are spooled: each Parquet file becomes one plain file of
concatenated images in the working folder. This takes as much disk space as the source until the preparation ends.
"""

import json
import os
from pathlib import Path

from pipeline.data.hashed_file import HashedFile
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.parquet_images import ImageColumns, image_columns, open_parquet, unpack
from pipeline.data.space import check_space
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import ImageLocation, Scan, find_split_files, tables_by_label_number
from pipeline.errors import DataError
from pipeline.files import write_text


def scan_parquet(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Scans Parquet files that have a struct column with the image's `bytes`, and a label column."""
    if work is None:
        raise DataError(
            f"{root} contains Parquet files: convert them with `densenet data prepare`, or train on them as they are "
            f"(`densenet data index {root} --to FOLDER`)."
        )
    ignored = IgnoredFiles()
    files = find_split_files(root, "parquet", ignored)
    columns = {file: _columns(file) for split_files in files.values() for file in split_files}
    for file, file_columns in columns.items():
        for name in file_columns.unused:
            ignored.add(f"columns named {name}", str(file.relative_to(root)))
    class_names = common_class_names({str(file): file_columns for file, file_columns in columns.items()})
    spool = work / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    pending = [file for file in columns if not _spool_record(spool, root, file).is_file()]
    check_space(spool, sum(file.stat().st_size for file in pending), "images spooled from Parquet files")
    pool.map(_spool, [(root, file, spool, columns[file]) for file in pending], "spooling")
    images = {split: [row for file in f for row in _spooled_rows(spool, root, file)] for split, f in files.items()}
    classes, tables = tables_by_label_number(images, class_names, root)
    return Scan("parquet", spool, classes, tables, ignored=ignored)


def common_class_names(columns: dict[str, ImageColumns]) -> tuple[str, ...] | None:
    """Returns the class names in the metadata of several files, if they have any.

    Raises:
        DataError: the files differ in them, or in the label column.
    """
    first_file, first = next(iter(columns.items()))
    for file, file_columns in columns.items():
        if (file_columns.label, file_columns.class_names) != (first.label, first.class_names):
            raise DataError(
                f"{first_file} and {file} differ in their label column ({first.label}, {file_columns.label}) or in its "
                f"class names: equal labels would mean different classes."
            )
    return first.class_names


def _columns(file: Path) -> ImageColumns:
    try:
        with open_parquet(file, str(file)) as parquet:
            return image_columns(parquet.schema_arrow, str(file))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}): copy it again.") from error


def _spool_record(spool: Path, root: Path, file: Path) -> Path:
    """Returns the path of the list of a file's images, written after all are spooled.

    It depends on the file's size and modification time, so that a changed file is spooled again.
    """
    stat = file.stat()
    name = str(file.relative_to(root)).replace(os.sep, "_")
    return spool / f"{name}.{stat.st_size}.{stat.st_mtime_ns}.json"


def _spool(task: tuple[Path, Path, Path, ImageColumns]) -> None:
    root, file, spool, columns = task
    record = _spool_record(spool, root, file)
    with open_parquet(file, str(file)) as parquet, HashedFile(record.with_suffix(".bin")) as out:
        rows = unpack(parquet, columns, out, str(file))
    images = zip(rows.labels_N.tolist(), rows.names, rows.offsets_N.tolist(), rows.lengths_N.tolist(), strict=True)
    write_text(record, json.dumps(list(images)))


def _spooled_rows(spool: Path, root: Path, file: Path) -> list[tuple[int, ImageLocation]]:
    record = _spool_record(spool, root, file)
    rows = json.loads(record.read_text(encoding="utf-8"))
    path = record.with_suffix(".bin").name
    return [(label, ImageLocation(name, path, offset, length)) for label, name, offset, length in rows]
