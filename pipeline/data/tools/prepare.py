"""`densenet data prepare`: creates a data set from any source, part by part.

A scan finds the location of every image. The images are ordered and divided into parts: shards, or groups of images in
class folders. Each part is a function of the scan, the options and its number, so that any process can write any part,
the bytes are reproducible, and finished parts are reused after an interruption.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pipeline.config_data import MAX_PIXELS
from pipeline.data.class_names import require_two_classes
from pipeline.data.dataset import MANIFEST, Manifest, read_manifest, save_split
from pipeline.data.files import Files
from pipeline.data.images import NotAnImage, check_size, decode, encode, header, ignore_pil_warnings, shrink, to_rgb
from pipeline.data.index import Shard
from pipeline.data.order import ORDER_VERSION, permutation
from pipeline.data.space import check_space
from pipeline.data.tables import load_table, rows_of, save_table, table_of
from pipeline.data.tools import tars
from pipeline.data.tools.layouts import detect_layout
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import Scan
from pipeline.errors import DataError, listed
from pipeline.files import atomic_file, write_text

_WORK = ".prepare"
_FOLDER_PART_IMAGES = 1000
_ESTIMATE_IMAGES = 64  # encoded in advance to estimate the disk space that all images need
_TAR_BYTES_PER_SAMPLE = 3 * tars.BLOCK + tars.BLOCK // 2  # two headers, a label and half a block of padding


@dataclass(frozen=True)
class PrepareOptions:
    """Options that determine the written bytes.

    `shorter_side` (pixels) re-encodes every image with at most this shorter side; an image that would take more bytes
    is copied instead. `quality` is the JPEG quality of re-encoded images and of images converted from other formats.
    """

    to: Literal["shards", "folders"] = "shards"
    seed: int = 0
    shard_bytes: int = 128_000_000
    shorter_side: int | None = None
    quality: int = 95


@dataclass(frozen=True)
class PrepareResult:
    """The result of a preparation.

    `parts` counts the parts of this share, `parts_reused` those that an earlier command had written. `skipped_corrupt`
    names the skipped corrupt images; `notes` are lines on ignored files and doubtful classes. While other shares are
    incomplete, `manifest` is None and `parts_missing` counts their unfinished parts.
    """

    manifest: Manifest | None
    parts: int
    parts_reused: int
    skipped_corrupt: list[str]
    parts_missing: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    """One shard, or one group of images in class folders; `table` has its rows of the scan, in order."""

    source: Path
    target: Path
    split: str
    number: int
    table: pa.Table
    options: PrepareOptions
    skip_corrupt: bool
    max_pixels: int

    @property
    def label(self) -> str:
        return f"{self.split}-{self.number:06d}"

    @property
    def shard(self) -> str:
        return f"{self.split}/{self.label}.tar"

    @property
    def record(self) -> Path:
        """The path of the part's index; a part is finished when this file exists."""
        return self.target / _WORK / f"{self.label}.parquet"


@dataclass(frozen=True)
class _PartResult:
    """The result of writing a part; the part is unfinished if images are corrupt and must not be skipped."""

    bytes: int
    sha256: str
    converted: int
    corrupt: list[str]


def prepare(
    source: Path,
    target: Path,
    options: PrepareOptions,
    pool: Pool,
    layout: str | None = None,
    skip_corrupt: bool = False,
    share: tuple[int, int] = (0, 1),
    max_pixels: int = MAX_PIXELS,
) -> PrepareResult:
    """Creates a data set in `target` from the images in `source`, or resumes an interrupted preparation.

    Images that are corrupt, of an unsupported format or larger than `max_pixels` raise an error after all others are
    written; `skip_corrupt` skips them instead. `share` is (K, N): N processes, on any machines that see both folders,
    write every N-th part each, and the last one to finish completes the data set.

    Raises:
        DataError: the source's layout is unknown or an archive is corrupt, or the target is in use, lacks disk space
            or contains something else.
    """
    target = target.absolute()
    _check_folders(source.absolute(), target)
    index, shares = share
    with _work_folder(target, share) as work:
        with FileLock(work / "scan"):  # one share at a time: a scan may spool images to the working folder
            scan = detect_layout(source, layout).scan(source.absolute(), work, pool)
        require_two_classes(scan.classes, source)
        notes = scan.notes()
        job = _job_hash(scan, options)
        finished = read_manifest(target)
        if finished is not None:
            if finished.made.get("job") != job:
                raise DataError(
                    f"{target} already contains a data set of other images, of other options, or in the sample order "
                    f"of an earlier version: choose another folder."
                )
            return PrepareResult(finished, 0, 0, finished.made["ignored"], notes=notes)
        with FileLock(work / "turn"):
            _check_same_job(work, f"{job} {shares}", target)
        parts = [
            part for split in scan.splits for part in _parts(scan, split, target, options, skip_corrupt, max_pixels)
        ]
        share_parts = parts[index::shares]
        pending = [part for part in share_parts if not _is_finished(part)]
        for part in pending:
            for leftover in work.glob(f"{part.label}.*.tmp"):
                leftover.unlink()
        _check_disk_space(pending, scan, options, target)
        for split in scan.splits:
            (target / split).mkdir(exist_ok=True)
        sizes = [pc.sum(part.table["length"]).as_py() for part in pending]
        results = pool.map(_write_part, pending, "preparing", sizes)
        corrupt = _unreadable_files(scan) + [line for result in results for line in result.corrupt]
        if corrupt and not skip_corrupt:
            raise DataError(
                f"{len(corrupt)} corrupt images in {source}:\n  " + listed(corrupt, "\n  ") + "\nAll others are "
                "written. Fix these and repeat the command, or skip them with --skip-corrupt."
            )
        with FileLock(work / "turn"):
            manifest = read_manifest(target)  # another share may have completed the data set meanwhile
            missing = [] if manifest else [part for part in parts if not _is_finished(part)]
            if not manifest and not missing:
                manifest = _complete(scan, parts, target, options, job)
        skipped = manifest.made["ignored"] if manifest else corrupt
        return PrepareResult(manifest, len(share_parts), len(share_parts) - len(pending), skipped, len(missing), notes)


def _unreadable_files(scan: Scan) -> list[str]:
    """Returns a line for each file that the scan could not read."""
    return [
        f"{path} in {scan.root}: {problem}" for problems in scan.problems.values() for path, problem in problems.items()
    ]


def _check_folders(source: Path, target: Path) -> None:
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise DataError(f"the target {target} must not be inside the source {source}: choose another folder.")
    if target.is_dir():
        others = [name for name in sorted(os.listdir(target)) if name not in (_WORK, MANIFEST)]
        if others and not (target / _WORK).is_dir() and not (target / MANIFEST).is_file():
            raise DataError(f"{target} is not empty (it contains {listed(others)}): choose an empty or a new folder.")


@contextmanager
def _work_folder(target: Path, share: tuple[int, int]) -> Iterator[Path]:
    """Yields the working folder in the target to one process per share; removes it when the data set is complete."""
    work = target / _WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / f"lock.{share[0]}", timeout=0):
            yield work
        if (target / MANIFEST).is_file():  # after closing the lock: on NFS, an open file keeps its folder
            shutil.rmtree(work, ignore_errors=True)
    except Timeout:
        which = f"share {share[0]}/{share[1]} of {target}" if share[1] > 1 else target
        raise DataError(f"another process is preparing {which}: wait for it, or stop it.") from None
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror or error}. Finished parts are kept.") from error


def _job_hash(scan: Scan, options: PrepareOptions) -> str:
    """Returns a hash of everything that determines the output."""
    order = ORDER_VERSION if options.to == "shards" else None
    digest = hashlib.sha256(json.dumps([scan.layout, scan.classes, asdict(options), order]).encode())
    for split, table in scan.splits.items():
        digest.update(split.encode())
        for name in ("path", "name"):
            digest.update("\0".join(table[name].to_pylist()).encode())
        for name in ("offset", "length", "label"):
            digest.update(table[name].to_numpy().tobytes())
    return digest.hexdigest()


def _check_same_job(work: Path, job: str, target: Path) -> None:
    """Records the job of a new target; raises `DataError` if an unfinished target has another job."""
    record = work / "job"
    if not record.is_file():
        write_text(record, job)
    elif record.read_text(encoding="utf-8") != job:
        raise DataError(
            f"{target} contains an unfinished preparation of other images, with other options, with another number of "
            f"shares or by an earlier version, whose sample order differs: repeat that command, with that version, or "
            f"remove {target} to start from scratch."
        )


def _parts(
    scan: Scan, split: str, target: Path, options: PrepareOptions, skip_corrupt: bool, max_pixels: int
) -> list[_Part]:
    table = scan.splits[split]
    count = len(table)
    if options.to == "shards":
        table = table.take(permutation(options.seed, 0, count)(np.arange(count)))
        num_parts = max(1, -(-pc.sum(table["length"]).as_py() // options.shard_bytes))
    else:
        _check_names(table, split)
        num_parts = -(-count // _FOLDER_PART_IMAGES)
    bounds = [i * count // num_parts for i in range(num_parts + 1)]
    return [
        _Part(scan.root, target, split, i, rows_of(table, start, stop - start), options, skip_corrupt, max_pixels)
        for i, (start, stop) in enumerate(pairwise(bounds))
    ]


def _check_names(table: pa.Table, split: str) -> None:
    """Raises `DataError` unless every image has a unique file name in a class folder."""
    names = table["name"].to_pylist()
    invalid = [name for name in names if len(PurePosixPath(name).parts) != 2 or ".." in PurePosixPath(name).parts]
    if invalid:
        raise DataError(f"the {split} split's classes cannot be folder names ({listed(invalid)}): prepare shards.")
    files = [_file_name(name) for name in names]
    if len(set(files)) < len(files):
        seen: set[str] = set()
        repeated = [name for name in files if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise DataError(
            f"the {split} split has images of the same class and name ({listed(repeated)}): prepare shards."
        )


def _file_name(name: str) -> str:
    """Returns an image's name in a class folder: the source's name, with a JPEG extension."""
    return name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"


def _is_finished(part: _Part) -> bool:
    """Returns whether the part is complete; a part that is just being renamed is not."""
    if not part.record.is_file():
        return False
    result = _read_record(part)
    if part.options.to == "folders":
        return True
    shard = part.target / part.shard
    return shard.is_file() and shard.stat().st_size == result.bytes


def _read_record(part: _Part) -> _PartResult:
    return _PartResult(**json.loads(pq.read_schema(part.record).metadata[b"written"]))


def _check_disk_space(pending: list[_Part], scan: Scan, options: PrepareOptions, target: Path) -> None:
    samples = sum(len(part.table) for part in pending)
    size = sum(pc.sum(part.table["length"]).as_py() for part in pending)
    if options.shorter_side is not None and pending:
        size = int(size * _estimate_compression(pending, options))
    check_space(target, size + samples * _TAR_BYTES_PER_SAMPLE, "the images")


def _estimate_compression(pending: list[_Part], options: PrepareOptions) -> float:
    """Estimates bytes after / before re-encoding from a few images of the first part, plus 10 %."""
    table = pending[0].table.slice(0, _ESTIMATE_IMAGES)
    before = after = 0
    with ignore_pil_warnings():
        for path, offset, length in zip(
            *(table[name].to_pylist() for name in ("path", "offset", "length")), strict=True
        ):
            content = Files().open(pending[0].source / path).read(offset, length)
            try:
                after += len(convert(content, options, pending[0].max_pixels)[0])
                before += length
            except NotAnImage:
                continue
    return 1.1 * after / before if before else 1.0


def convert(content: bytes, options: PrepareOptions, max_pixels: int = MAX_PIXELS) -> tuple[bytes, int, int]:
    """Returns an image as stored, a gray or RGB JPEG, with its width and height in pixels.

    A gray or RGB JPEG that is not re-encoded is copied; only its header and end-of-image marker are checked.

    Raises:
        NotAnImage: the image is corrupt, of an unsupported format, or too large.
    """
    head = header(content, content)
    check_size(head.width, head.height, max_pixels)
    if head.plain_jpeg and options.shorter_side is None:
        return content, head.width, head.height
    image = to_rgb(decode(content, max_pixels))
    if options.shorter_side is not None:
        image = shrink(image, options.shorter_side)
    encoded = encode(image, options.quality)
    if head.plain_jpeg and image.size == (head.width, head.height) and len(encoded) >= len(content):
        return content, head.width, head.height
    return encoded, image.width, image.height


def _write_part(part: _Part) -> _PartResult:
    """Writes one part; its record is written last and marks it as finished."""
    try:
        with ignore_pil_warnings():
            return _write_shard(part) if part.options.to == "shards" else _write_folder_part(part)
    except OSError as error:
        raise DataError(
            f"{error.filename or part.target / part.shard}: {error.strerror or error}. Finished parts are kept."
        ) from error


def _converted_images(part: _Part, corrupt: list[str]) -> Iterator[tuple[dict[str, Any], bytes, bool]]:
    """Yields (index row without its path, stored bytes, whether converted) per image; lists corrupt ones instead."""
    files = Files()
    columns = (part.table[name].to_pylist() for name in ("path", "name", "offset", "length", "label"))
    for path, name, offset, length, label in zip(*columns, strict=True):
        content = files.open(part.source / path).read(offset, length)
        try:
            if len(content) < length:
                raise NotAnImage("is truncated: the file has become shorter")
            stored, width, height = convert(content, part.options, part.max_pixels)
        except NotAnImage as error:
            corrupt.append(f"{name} in {part.source / path}: {error}")
            continue
        row = {
            "name": name,
            "length": len(stored),
            "label": label,
            "width": width,
            "height": height,
            "crc32": zlib.crc32(stored),
        }
        yield row, stored, stored is not content


def _temporary_file(part: _Part) -> Path:
    """Returns the path that a file of a part is written to first; the next preparation removes leftovers."""
    return part.target / _WORK / f"{part.label}.{os.getpid()}.tmp"


def _write_shard(part: _Part) -> _PartResult:
    """Writes a WebDataset shard: NUMBER.jpg and NUMBER.cls per sample, where NUMBER is its position in the split."""
    rows: list[dict[str, Any]] = []
    corrupt: list[str] = []
    converted = 0
    shard = part.target / part.shard
    temporary = _temporary_file(part)
    with temporary.open("wb") as raw_file:
        file = _HashingWriter(raw_file)
        for number, (row, stored, changed) in enumerate(_converted_images(part, corrupt)):
            key = f"{part.number:06d}{number:06d}"
            row |= {"path": part.shard, "offset": file.position + tars.BLOCK}
            tars.append_member(file, f"{key}.jpg", stored)
            tars.append_member(file, f"{key}.cls", str(row["label"]).encode())
            rows.append(row)
            converted += changed
        tars.write_end(file, file.position)
        raw_file.flush()
        os.fsync(raw_file.fileno())
    result = _PartResult(file.position, file.digest.hexdigest(), converted, corrupt)
    if corrupt and not part.skip_corrupt:
        temporary.unlink()
    else:
        _save_record(part, rows, result)
        temporary.replace(shard)
    return result


class _HashingWriter:
    """A file written sequentially, with its SHA-256 and position."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest, self.position = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.position += len(content)
        return self._file.write(content)


def _write_folder_part(part: _Part) -> _PartResult:
    rows: list[dict[str, Any]] = []
    corrupt: list[str] = []
    converted = 0
    for row, stored, changed in _converted_images(part, corrupt):
        row["path"] = f"{part.split}/{_file_name(row.pop('name'))}"
        file = part.target / row["path"]
        file.parent.mkdir(exist_ok=True)
        with atomic_file(file, _temporary_file(part)) as temporary:
            temporary.write_bytes(stored)
        rows.append(row)
        converted += changed
    result = _PartResult(sum(row["length"] for row in rows), "", converted, corrupt)
    if part.skip_corrupt or not corrupt:
        _save_record(part, rows, result)
    return result


def _save_record(part: _Part, rows: list[dict[str, Any]], result: _PartResult) -> None:
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {"path": 0})}
    table = table_of(columns).replace_schema_metadata({"written": json.dumps(asdict(result))})
    save_table(table, part.record)


def _complete(scan: Scan, parts: list[_Part], target: Path, options: PrepareOptions, job: str) -> Manifest:
    """Writes the indexes of all parts and then the manifest, which marks the data set as complete."""
    splits = {}
    results = {part.record: _read_record(part) for part in parts}
    for split in scan.splits:
        split_parts = [part for part in parts if part.split == split]
        tables = [load_table(part.record) for part in split_parts]
        table = pa.concat_tables(tables).unify_dictionaries().combine_chunks().replace_schema_metadata()
        _check_classes(table, scan.classes, split)
        shards = {
            part.shard: Shard(results[part.record].bytes, results[part.record].sha256)
            for part in split_parts
            if options.to == "shards"
        }
        splits[split] = save_split(target, split, table, scan.classes, shards)
    made = {
        "from": scan.layout,
        "job": job,
        **asdict(options),
        "converted": sum(result.converted for result in results.values()),
        "ignored": _unreadable_files(scan) + [line for result in results.values() for line in result.corrupt],
        "not_taken": scan.ignored.lines(),
    }
    manifest = Manifest(options.to, scan.classes, splits, made)
    manifest.save(target)
    return manifest


def _check_classes(table: pa.Table, classes: tuple[str, ...], split: str) -> None:
    """Raises `DataError` if skipping corrupt images left a training class without images."""
    if split == "train":
        empty = np.flatnonzero(np.bincount(table["label"].to_numpy(), minlength=len(classes)) == 0)
        if len(empty):
            raise DataError(
                f"the training split has no readable image of the classes {listed([classes[i] for i in empty])}."
            )
