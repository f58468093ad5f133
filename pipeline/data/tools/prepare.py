"""`densenet data prepare`: from any source to a data set's folder, part by part.

The source is scanned for where its images lie. They are put in order and cut into parts: shards, or runs of images
in class folders. Each part follows from the scan, the options and its number alone, so that parts are written by any
process in any order, come out the same every time, and are not written again after an interruption.
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

from pipeline.config import MAX_PIXELS
from pipeline.data.class_names import require_two_classes
from pipeline.data.dataset import MANIFEST, Manifest, Split, index_file, read_manifest
from pipeline.data.files import Files
from pipeline.data.images import NotAnImage, check_size, decode, encode, header, ignore_pil_warnings, shrink, to_rgb
from pipeline.data.index import Shard, load_table, rows_of, save_table, table_of
from pipeline.data.plan import permutation
from pipeline.data.space import check_space
from pipeline.data.tools import tars
from pipeline.data.tools.layouts import recognize
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import Scan
from pipeline.errors import DataError, listed
from pipeline.files import atomic_file, write_text

_WORK = ".prepare"
_FOLDER_PART = 1000  # images
_SAMPLED = 64  # images that are encoded beforehand, to know how much room all will take
_PER_SAMPLE = 3 * tars.BLOCK + tars.BLOCK // 2  # two headers, a label and half a block of padding


@dataclass(frozen=True)
class PrepareOptions:
    """What decides the bytes that are written.

    `shorter_side` (pixels) re-encodes every image, with the shorter side at most that; an image that would grow is
    kept as it is. `quality` is that of JPEGs that are encoded: re-encoded images, and those that were no plain JPEGs.
    """

    to: Literal["shards", "folders"] = "shards"
    seed: int = 0
    shard_bytes: int = 128_000_000
    shorter_side: int | None = None
    quality: int = 95


@dataclass(frozen=True)
class PreparedSet:
    """What was done: the manifest, the parts of this share, those that an earlier start had written, what is left out
    for corruption, and lines on what else is not taken or is doubtful.

    `manifest` is None, and `waiting` the number of parts, where other shares have not written theirs yet.
    """

    manifest: Manifest | None
    parts: int
    parts_found: int
    ignored: list[str]
    waiting: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    """One shard, or one run of images of class folders; `table` holds its rows of the scan, in order."""

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
        """The part's index; the part is finished when this is there."""
        return self.target / _WORK / f"{self.label}.parquet"


@dataclass(frozen=True)
class _Written:
    """What became of a part; it is not finished where images are corrupt and none may be left out."""

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
) -> PreparedSet:
    """Makes a data set in `target` from the images in `source`.

    An interrupted preparation goes on where it was. Corrupt images, those of kinds that are not used and those of
    more than `max_pixels` are an error, told when all else is written, or are left out with `skip_corrupt`. `share` is
    (K, N) where N processes, on any machines that see both folders, write
    every N-th part each; the one that is done last completes the data set.

    Raises:
        DataError: the source is not understood or is corrupt, the target is in use, full, or holds something else.
    """
    target = target.absolute()
    _check_locations(source.absolute(), target)
    index, shares = share
    with _working(target, share) as work:
        with FileLock(work / "scan"):  # of one share at a time: it may spool images to the working folder
            scan = recognize(source, layout).scan(source.absolute(), work, pool)
        require_two_classes(scan.classes, source)
        notes = scan.notes()
        job = _job(scan, options)
        finished = read_manifest(target)
        if finished is not None:
            if finished.made.get("job") != job:
                raise DataError(f"{target} holds another data set (or the same with other options): choose another.")
            return PreparedSet(finished, 0, 0, finished.made["ignored"], notes=notes)
        with FileLock(work / "turn"):
            _claim(work, f"{job} {shares}", target)
        parts = [
            part for split in scan.splits for part in _parts(scan, split, target, options, skip_corrupt, max_pixels)
        ]
        mine = parts[index::shares]
        todo = [part for part in mine if not _is_finished(part)]
        for part in todo:
            for left in work.glob(f"{part.label}.*.tmp"):
                left.unlink()
        _check_disk_space(todo, scan, options, target)
        for split in scan.splits:
            (target / split).mkdir(exist_ok=True)
        sizes = [pc.sum(part.table["length"]).as_py() for part in todo]
        written = pool.map(_write, todo, "preparing", sizes)
        corrupt = _unread(scan) + [line for part in written for line in part.corrupt]
        if corrupt and not skip_corrupt:
            raise DataError(
                f"{len(corrupt)} corrupt images in {source}:\n  " + listed(corrupt, "\n  ") + "\nAll others are "
                "written. Mend these and start again, or leave them out with --skip-corrupt."
            )
        with FileLock(work / "turn"):
            manifest = read_manifest(target)  # of another share that was done at the same time
            waiting = [] if manifest else [part for part in parts if not _is_finished(part)]
            if not manifest and not waiting:
                manifest = _assemble(scan, parts, target, options, job)
        ignored = manifest.made["ignored"] if manifest else corrupt
        return PreparedSet(manifest, len(mine), len(mine) - len(todo), ignored, len(waiting), notes)


def _unread(scan: Scan) -> list[str]:
    """What the scan could not take, a line each."""
    return [
        f"{path} in {scan.root}: {problem}" for problems in scan.problems.values() for path, problem in problems.items()
    ]


def _check_locations(source: Path, target: Path) -> None:
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise DataError(f"the target {target} must not lie in the source {source}: choose another place.")
    if target.is_dir():
        others = [name for name in sorted(os.listdir(target)) if name not in (_WORK, MANIFEST)]
        if others and not (target / _WORK).is_dir() and not (target / MANIFEST).is_file():
            raise DataError(f"{target} is not empty (in it: {listed(others)}): choose an empty or a new folder.")


@contextmanager
def _working(target: Path, share: tuple[int, int]) -> Iterator[Path]:
    """The working folder in the target, for one process of each share; it goes when the data set is complete."""
    work = target / _WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / f"lock.{share[0]}", timeout=0):
            yield work
        if (target / MANIFEST).is_file():  # after the lock: NFS keeps a file that is open, and its folder with it
            shutil.rmtree(work, ignore_errors=True)
    except Timeout:
        which = f"share {share[0]}/{share[1]} of {target}" if share[1] > 1 else target
        raise DataError(f"another process is preparing {which}: wait for it, or end it.") from None
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror or error}. What is finished is kept.") from error


def _job(scan: Scan, options: PrepareOptions) -> str:
    """A hash of all that decides the outcome."""
    digest = hashlib.sha256(json.dumps([scan.layout, scan.classes, asdict(options)]).encode())
    for split, table in scan.splits.items():
        digest.update(split.encode())
        for name in ("path", "name"):
            digest.update("\0".join(table[name].to_pylist()).encode())
        for name in ("offset", "length", "label"):
            digest.update(table[name].to_numpy().tobytes())
    return digest.hexdigest()


def _claim(work: Path, job: str, target: Path) -> None:
    """Binds an unfinished target to its job."""
    record = work / "job"
    if not record.is_file():
        write_text(record, job)
    elif record.read_text(encoding="utf-8") != job:
        raise DataError(
            f"{target} holds an unfinished preparation of other images, with other options or in another number of "
            f"shares: repeat that command, or remove {target} to start anew."
        )


def _parts(
    scan: Scan, split: str, target: Path, options: PrepareOptions, skip_corrupt: bool, max_pixels: int
) -> list[_Part]:
    table = scan.splits[split]
    count = len(table)
    if options.to == "shards":
        table = table.take(permutation(options.seed, 0, count))
        number = max(1, -(-pc.sum(table["length"]).as_py() // options.shard_bytes))
    else:
        _check_names(table, split)
        number = -(-count // _FOLDER_PART)
    bounds = [i * count // number for i in range(number + 1)]
    return [
        _Part(scan.root, target, split, i, rows_of(table, start, stop - start), options, skip_corrupt, max_pixels)
        for i, (start, stop) in enumerate(pairwise(bounds))
    ]


def _check_names(table: pa.Table, split: str) -> None:
    """Class folders need a file name of its own for each image."""
    names = table["name"].to_pylist()
    odd = [name for name in names if len(PurePosixPath(name).parts) != 2 or ".." in PurePosixPath(name).parts]
    if odd:
        raise DataError(f"the {split} split's classes cannot be folders ({listed(odd)}): prepare shards.")
    files = [_file_name(name) for name in names]
    if len(set(files)) < len(files):
        seen: set[str] = set()
        twice = [name for name in files if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise DataError(f"the {split} split has images of the same class and name ({listed(twice)}): prepare shards.")


def _file_name(name: str) -> str:
    """An image's name in a class folder: the source's, with an ending that says what it now is."""
    return name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"


def _is_finished(part: _Part) -> bool:
    """Whether the part is there whole; in the middle of a rename it counts as not."""
    if not part.record.is_file():
        return False
    written = _read_record(part)
    if part.options.to == "folders":
        return True
    shard = part.target / part.shard
    return shard.is_file() and shard.stat().st_size == written.bytes


def _read_record(part: _Part) -> _Written:
    return _Written(**json.loads(pq.read_schema(part.record).metadata[b"written"]))


def _check_disk_space(todo: list[_Part], scan: Scan, options: PrepareOptions, target: Path) -> None:
    samples = sum(len(part.table) for part in todo)
    size = sum(pc.sum(part.table["length"]).as_py() for part in todo)
    if options.shorter_side is not None and todo:
        size = int(size * _shrinkage(todo, options))
    check_space(target, size + samples * _PER_SAMPLE, "the images")


def _shrinkage(todo: list[_Part], options: PrepareOptions) -> float:
    """Which share of the bytes re-encoding leaves, from a few images of the first part."""
    table = todo[0].table.slice(0, _SAMPLED)
    before = after = 0
    with ignore_pil_warnings():
        for path, offset, length in zip(
            *(table[name].to_pylist() for name in ("path", "offset", "length")), strict=True
        ):
            content = Files().open(todo[0].source / path).read(offset, length)
            try:
                after += len(convert(content, options, todo[0].max_pixels)[0])
                before += length
            except NotAnImage:
                continue
    return 1.1 * after / before if before else 1.0


def convert(content: bytes, options: PrepareOptions, max_pixels: int = MAX_PIXELS) -> tuple[bytes, int, int]:
    """An image as it is stored, a gray or RGB JPEG, with its width and height in pixels.

    Raises:
        NotAnImage: it is corrupt, of a kind that is not used, or too large. Of a plain JPEG that is not encoded
            anew, only the head and the end mark are looked at.
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


def _write(part: _Part) -> _Written:
    """Writes one part; it is finished when its record is there, which comes last."""
    try:
        with ignore_pil_warnings():
            return _write_shard(part) if part.options.to == "shards" else _write_folder_part(part)
    except OSError as error:
        raise DataError(
            f"{error.filename or part.target / part.shard}: {error.strerror or error}. What is finished is kept."
        ) from error


def _images(part: _Part, corrupt: list[str]) -> Iterator[tuple[dict[str, Any], bytes, bool]]:
    """The part's images as they are stored, with their rows so far; those that are corrupt are listed instead."""
    files = Files()
    columns = (part.table[name].to_pylist() for name in ("path", "name", "offset", "length", "label"))
    for path, name, offset, length, label in zip(*columns, strict=True):
        content = files.open(part.source / path).read(offset, length)
        try:
            if len(content) < length:
                raise NotAnImage("is cut short: the file has become shorter")
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


def _aside(part: _Part) -> Path:
    """Where a file of a part is written first: among the unfinished work, which the next start clears."""
    return part.target / _WORK / f"{part.label}.{os.getpid()}.tmp"


def _write_shard(part: _Part) -> _Written:
    """A WebDataset shard: for each sample NUMBER.jpg and NUMBER.cls, NUMBER being its place in the split's order."""
    rows: list[dict[str, Any]] = []
    corrupt: list[str] = []
    converted = 0
    shard = part.target / part.shard
    aside = _aside(part)
    with aside.open("wb") as plain:
        file = _Hashing(plain)
        for number, (row, stored, changed) in enumerate(_images(part, corrupt)):
            key = f"{part.number:06d}{number:06d}"
            row |= {"path": part.shard, "offset": file.position + tars.BLOCK}
            tars.append(file, f"{key}.jpg", stored)
            tars.append(file, f"{key}.cls", str(row["label"]).encode())
            rows.append(row)
            converted += changed
        tars.finish(file, file.position)
        plain.flush()
        os.fsync(plain.fileno())
    written = _Written(file.position, file.digest.hexdigest(), converted, corrupt)
    if corrupt and not part.skip_corrupt:
        aside.unlink()
    else:
        _save_record(part, rows, written)
        aside.replace(shard)
    return written


class _Hashing:
    """A file that is written once, from the start to the end."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest, self.position = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.position += len(content)
        return self._file.write(content)


def _write_folder_part(part: _Part) -> _Written:
    rows: list[dict[str, Any]] = []
    corrupt: list[str] = []
    converted = 0
    for row, stored, changed in _images(part, corrupt):
        row["path"] = f"{part.split}/{_file_name(row.pop('name'))}"
        file = part.target / row["path"]
        file.parent.mkdir(exist_ok=True)
        with atomic_file(file, _aside(part)) as aside:
            aside.write_bytes(stored)
        rows.append(row)
        converted += changed
    written = _Written(sum(row["length"] for row in rows), "", converted, corrupt)
    if part.skip_corrupt or not corrupt:
        _save_record(part, rows, written)
    return written


def _save_record(part: _Part, rows: list[dict[str, Any]], written: _Written) -> None:
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {"path": 0})}
    table = table_of(columns).replace_schema_metadata({"written": json.dumps(asdict(written))})
    save_table(table, part.record)


def _assemble(scan: Scan, parts: list[_Part], target: Path, options: PrepareOptions, job: str) -> Manifest:
    """Writes the indexes and, last of all, the manifest."""
    splits = {}
    records = {part.record: _read_record(part) for part in parts}
    for split in scan.splits:
        of_split = [part for part in parts if part.split == split]
        tables = [load_table(part.record) for part in of_split]
        table = pa.concat_tables(tables).unify_dictionaries().combine_chunks().replace_schema_metadata()
        _check_classes(table, scan.classes, split)
        file = index_file(target, split)
        file.parent.mkdir(exist_ok=True)
        save_table(table, file)
        shards = {
            part.shard: Shard(records[part.record].bytes, records[part.record].sha256)
            for part in of_split
            if options.to == "shards"
        }
        splits[split] = Split(len(table), pc.sum(table["length"]).as_py(), shards)
    written = records.values()
    made = {
        "from": scan.layout,
        "job": job,
        **asdict(options),
        "converted": sum(part.converted for part in written),
        "ignored": _unread(scan) + [line for part in written for line in part.corrupt],
        "not_taken": scan.ignored.lines(),
    }
    manifest = Manifest(options.to, scan.classes, splits, made)
    manifest.save(target)
    return manifest


def _check_classes(table: pa.Table, classes: tuple[str, ...], split: str) -> None:
    """No training class may be without images, once the corrupt ones are left out."""
    if split == "train":
        empty = np.flatnonzero(np.bincount(table["label"].to_numpy(), minlength=len(classes)) == 0)
        if len(empty):
            raise DataError(f"no training image is left of the classes {listed([classes[i] for i in empty])}.")
