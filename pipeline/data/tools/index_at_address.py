"""`densenet data index SOURCE --to FOLDER`: indexes shards where they are, at a URI or in a folder; copies no data set.

Each shard is downloaded once to a temporary file, scanned and deleted. Its record is kept until all are complete, so
that the command can be repeated after an interruption.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pipeline.config_data import MAX_PIXELS
from pipeline.data.class_names import require_two_classes
from pipeline.data.dataset import MANIFEST, Manifest, save_split
from pipeline.data.files import File
from pipeline.data.hashed_file import Copied, HashedFile
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.index import Shard
from pipeline.data.listing import member_ignore_reason
from pipeline.data.parquet_images import ImageColumns, image_columns, open_parquet_at, unpack, unpacked_name
from pipeline.data.sources import copy_file, errors_name_uri
from pipeline.data.space import check_space
from pipeline.data.streaming.download import Download, FetchError
from pipeline.data.tables import SCHEMA, load_table, save_table, table_of
from pipeline.data.tools.from_parquet import common_class_names
from pipeline.data.tools.image_checks import Chunk, check_images
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.rows import Rows
from pipeline.data.tools.scan import Scan, classes_by_label_number, paths_by_split
from pipeline.data.tools.selection import EVERYTHING, Selection, select
from pipeline.data.tools.shard_samples import read_samples
from pipeline.data.tools.tars import read_members
from pipeline.errors import DataError, listed
from pipeline.files import PARTIAL_PREFIX

_WORK = ".index"
_EXTENSIONS = {"webdataset": "tar", "parquet": "parquet"}  # by layout
_PATIENCE_S = 60.0  # until an error of the network ends the command
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class _Task:
    """One shard: its path below the address, its size there in bytes, and the file for its record."""

    address: str
    split: str
    path: str
    size: int
    record: Path
    max_pixels: int

    @property
    def where(self) -> str:
        return f"{self.address}/{self.path}"

    @property
    def shard(self) -> str:
        """The shard's name in the index."""
        return unpacked_name(self.path) if self.path.endswith(".parquet") else self.path


@dataclass(frozen=True)
class _Scanned:
    """A shard's size and hash, its samples by offset with the labels' numbers, and what was ignored.

    `columns` are those of a Parquet file.
    """

    copied: Copied
    rows: dict[str, Any]
    ignored: IgnoredFiles
    columns: ImageColumns | None = None


def index_at_address(
    source: str,
    target: Path,
    pool: Pool,
    layout: str | None = None,
    max_pixels: int = MAX_PIXELS,
    selection: Selection = EVERYTHING,
) -> tuple[Manifest, list[str]]:
    """Indexes WebDataset shards or Parquet files below `source`, a URI or a folder, into the new folder `target`.

    The disk holds as many shards at a time as the pool has processes. Returns the manifest, and notes on ignored files
    and doubtful classes.

    Raises:
        DataError: the source cannot be read, has another layout, or has corrupt images; or `target` is in use.
    """
    address = source.rstrip("/") if "://" in source else str(Path(source).expanduser().absolute())
    _check_target(target, address)
    ignored = IgnoredFiles()
    found = _list_files(address, ignored)
    extension = _EXTENSIONS[layout := _detect_layout(address, list(found), layout)]
    splits = paths_by_split(found, extension, address, ignored)
    with _work_folder(target) as work:
        tasks = [
            _Task(address, split, path, found[path]["size"], _record(work, path, found[path], max_pixels), max_pixels)
            for split, paths in splits.items()
            for path in sorted(paths)
        ]
        pending = [task for task in tasks if not task.record.is_file()]
        sizes = [task.size for task in pending]
        check_space(work, sum(sorted(sizes)[-pool.workers :]), "the shards that are read at the same time")
        corrupt = [line for lines in pool.map(_index_shard, pending, "indexing", sizes) for line in lines]
        if corrupt:
            raise DataError(
                f"{len(corrupt)} corrupt images in {address}:\n  " + listed(corrupt, "\n  ") + "\nReplace or remove "
                "them, and repeat the command: the shards without corrupt images are not read again."
            )
        return _complete(address, layout, target, tasks, ignored, selection)


def _check_target(target: Path, address: str) -> None:
    if target.absolute() == Path(address):
        raise DataError(f"--to={target} is the source: choose another folder, or omit --to to index it in place.")
    if (target / MANIFEST).is_file():
        raise DataError(f"{target} has a {MANIFEST} already: remove it to index again, or choose another folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / _WORK).is_dir():
        raise DataError(f"{target} is not empty: choose an empty or a new folder.")


def _list_files(address: str, ignored: IgnoredFiles) -> dict[str, dict[str, Any]]:
    """Returns what is known about each file below an address, by path; counts hidden files in `ignored`."""
    with errors_name_uri(address):
        files, root = fsspec.core.url_to_fs(address)
        found = files.find(root, detail=True)
    infos = {path.removeprefix(root).lstrip("/"): info for path, info in found.items() if info["type"] == "file"}
    for path in list(infos):
        reason = member_ignore_reason(path)
        if reason is not None:
            ignored.add(reason, path)
            del infos[path]
    return infos


def _detect_layout(address: str, paths: list[str], layout: str | None) -> str:
    if layout is not None and layout not in _EXTENSIONS:
        raise DataError(f"layout '{layout}' cannot be read at an address: use {' or '.join(_EXTENSIONS)}.")
    if MANIFEST in paths:
        raise DataError(f"{address} is a data set with an index already: use data.root={address}.")
    present = [name for name, end in _EXTENSIONS.items() if any(path.endswith(f".{end}") for path in paths)]
    if not present or layout not in (None, *present):
        raise DataError(
            f"{address} has no {f'.{_EXTENSIONS[layout]}' if layout else '.tar and no .parquet'} files, but contains: "
            f"{listed(sorted(paths)) or 'nothing'}. Correct the address; `densenet data prepare` converts folders of "
            f"other layouts."
        )
    if layout is None and len(present) > 1:
        raise DataError(f"{address} has .tar and .parquet files: choose one with --layout {' or '.join(present)}.")
    return layout or present[0]


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """Yields the folder of the records and temporary files to one process; removes it when the index is complete."""
    work = target / _WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock", timeout=0):
            for leftover in work.glob(f"{PARTIAL_PREFIX}*"):
                shutil.rmtree(leftover)
            yield work
        shutil.rmtree(work, ignore_errors=True)  # after closing the lock: on NFS, an open file keeps its folder
    except Timeout:
        raise DataError(f"another process is indexing to {target}: wait for it, or stop it.") from None
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror or error}. Finished shards are kept.") from error


def _record(work: Path, path: str, info: dict[str, Any], max_pixels: int) -> Path:
    """Returns the file for the record of a shard, another one if the shard changes (size, time, ETag)."""
    key = json.dumps([path, sorted(info.items()), max_pixels], default=str)
    return work / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.parquet"


def _index_shard(task: _Task) -> list[str]:
    """Downloads and scans one shard, and saves its record; returns its corrupt images instead if there are any."""
    download = Download(task.address, threading.Event(), lambda line: print(line, file=sys.stderr, flush=True))
    scan = _scan_parquet if task.path.endswith(".parquet") else _scan_tar
    with tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=task.record.parent) as folder:
        file = Path(folder, task.shard)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            scanned = download.retry(
                task.path, lambda files, root: scan(task, files, f"{root}/{task.path}", file), _PATIENCE_S
            )
        except FetchError as error:
            raise DataError(f"{error} Finished shards are kept.") from error
        table = table_of({"path": [task.shard] * len(scanned.rows["name"])} | scanned.rows)
        checks = check_images(Chunk(Path(folder), task.split, Rows(table), decode=False, max_pixels=task.max_pixels))
    corrupt = [f"{finding.where}: {finding.detail}" for finding in checks.findings if finding.is_error]
    if corrupt:
        return corrupt
    for name, values in {"width": checks.widths_N, "height": checks.heights_N, "crc32": checks.crc32_N}.items():
        i = SCHEMA.get_field_index(name)
        table = table.set_column(i, SCHEMA.field(i), pa.array(values, SCHEMA.field(i).type))
    columns = None if scanned.columns is None else asdict(scanned.columns)
    record = {"shard": asdict(scanned.copied), "ignored": scanned.ignored.to_json(), "columns": columns}
    save_table(table.replace_schema_metadata({"record": json.dumps(record)}), task.record)
    return []


def _scan_tar(task: _Task, files: Any, source: str, file: Path) -> _Scanned:
    copied, ignored = copy_file(files, source, file), IgnoredFiles()
    if copied.bytes != task.size:
        raise OSError(f"{copied.bytes:,} of {task.size:,} bytes were received")
    samples = read_samples(read_members(file, where=task.where), File(file).read, task.where, ignored)
    samples.sort(key=lambda sample: sample[1].offset)
    rows = {
        "name": [member.name for _, member in samples],
        "offset": [member.offset for _, member in samples],
        "length": [member.length for _, member in samples],
        "label": _labels(task, np.array([label for label, _ in samples], object)),
    }
    return _Scanned(copied, rows, ignored)


def _scan_parquet(task: _Task, files: Any, source: str, file: Path) -> _Scanned:
    ignored = IgnoredFiles()
    with open_parquet_at(files, source, task.where) as parquet, HashedFile(file) as out:
        columns = image_columns(parquet.schema_arrow, task.where)
        unpacked = unpack(parquet, columns, out, task.where)
        copied = out.copied
    for name in columns.unused:
        ignored.add(f"columns named {name}", task.path)
    rows = {
        "name": unpacked.names,
        "offset": unpacked.offsets_N,
        "length": unpacked.lengths_N,
        "label": _labels(task, unpacked.labels_N),
    }
    return _Scanned(copied, rows, ignored, columns)


def _labels(task: _Task, numbers_N: Any) -> Any:
    """Returns the labels' numbers as int32."""
    outside = [number for number in numbers_N.tolist() if not _INT32.min <= number <= _INT32.max]
    if outside:
        raise DataError(f"{task.where}: the label {outside[0]} is out of range: labels are class numbers from 0.")
    return numbers_N.astype(np.int32)


def _complete(
    address: str, layout: str, target: Path, tasks: list[_Task], ignored: IgnoredFiles, selection: Selection
) -> tuple[Manifest, list[str]]:
    """Writes the indexes from all records, and then the manifest, which marks the data set as complete."""
    records = {task: json.loads(pq.read_schema(task.record).metadata[b"record"]) for task in tasks}
    columns = {}
    for task, record in records.items():
        ignored.merge(IgnoredFiles.from_json(record["ignored"]))
        if record["columns"] is not None:
            names = record["columns"].pop("class_names")
            columns[task.where] = ImageColumns(class_names=names and tuple(names), **record["columns"])
    tables = dict[str, pa.Table]()
    shards = {task.shard: Shard(**record["shard"]) for task, record in records.items()}
    for split in dict.fromkeys(task.split for task in tasks):
        parts = {task: load_table(task.record) for task in tasks if task.split == split}
        for task, table in parts.items():
            if not len(table):
                ignored.add("shards without samples", task.path)
        tables[split] = pa.concat_tables(parts.values()).unify_dictionaries().combine_chunks().replace_schema_metadata()
        if not len(tables[split]):
            raise DataError(f"{address} has no {split} image.")
    numbers = {
        split: list(zip(table["label"].to_pylist(), table["name"].to_pylist(), strict=True))
        for split, table in tables.items()
    }
    class_names = common_class_names(columns) if columns else None
    classes, labels = classes_by_label_number(numbers, class_names, address)
    require_two_classes(classes, address)
    tables = {split: _labeled(table, classes, labels) for split, table in tables.items()}
    scan = select(Scan(layout, target, classes, tables, ignored=ignored), selection)
    splits = {
        split: save_split(target, split, table, scan.classes, {path: shards[path] for path in _paths(table)})
        for split, table in scan.splits.items()
    }
    made: dict[str, Any] = {"from": layout, "to": "index", "not_taken": ignored.lines()}
    if selection.to_json():
        made["selection"] = selection.to_json()
    manifest = Manifest("shards", scan.classes, splits, made, address)
    manifest.save(target)
    return manifest, scan.notes()


def _paths(table: pa.Table) -> list[str]:
    return pc.unique(table["path"].cast(pa.string())).to_pylist()


def _labeled(table: pa.Table, classes: tuple[str, ...], labels: dict[int, int]) -> pa.Table:
    """Returns a table with labels instead of the source's numbers, and with names of the form `CLASS/FILE`."""
    numbers, codes_N = np.unique(table["label"].to_numpy(), return_inverse=True)
    labels_N = np.array([labels[number] for number in numbers.tolist()], np.int32)[codes_N]
    files = pc.replace_substring_regex(table["name"], pattern=r"(?s)\A.*/", replacement="")
    names = pc.binary_join_element_wise(pa.array(classes).take(pa.array(labels_N)), files, "/")
    columns = {"name": names, "label": pa.array(labels_N)}
    for name, values in columns.items():
        i = SCHEMA.get_field_index(name)
        table = table.set_column(i, SCHEMA.field(i), values)
    return table
