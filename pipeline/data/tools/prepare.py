"""`densenet data prepare`: creates a data set from any source, part by part.

A scan finds the location of every image. The images are ordered and divided into parts: shards, or groups of images in
class folders. Each part is a function of the scan, the options and its number, so that any process can write any part,
the bytes are reproducible, and finished parts are reused after an interruption.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout

from pipeline.config_data import MAX_PIXELS
from pipeline.data.class_names import require_two_classes
from pipeline.data.dataset import MANIFEST, Manifest, read_manifest, save_split
from pipeline.data.order import ORDER_VERSION
from pipeline.data.tools.data_card import UNKNOWN, Origin, write_data_card
from pipeline.data.tools.layouts import detect_layout
from pipeline.data.tools.parts import (
    WORK,
    Part,
    PrepareOptions,
    check_disk_space,
    divide,
    file_names,
    is_finished,
    join_records,
    read_record,
    write_part,
)
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.rows import Rows
from pipeline.data.tools.scan import Scan
from pipeline.data.tools.selection import EVERYTHING, Selection, select
from pipeline.errors import DataError, listed
from pipeline.files import write_text

__all__ = ["PrepareOptions", "PrepareResult", "prepare"]

_HASH_ROWS = 1 << 16  # rows whose names are in memory as text at a time


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


def prepare(
    source: Path,
    target: Path,
    options: PrepareOptions,
    pool: Pool,
    layout: str | None = None,
    skip_corrupt: bool = False,
    share: tuple[int, int] = (0, 1),
    max_pixels: int = MAX_PIXELS,
    selection: Selection = EVERYTHING,
    origin: Origin = UNKNOWN,
) -> PrepareResult:
    """Creates a data set in `target` from the images in `source`, or resumes an interrupted preparation.

    Images that are corrupt, of an unsupported format or larger than `max_pixels` raise an error after all others are
    written; `skip_corrupt` skips them instead. `share` is (K, N): N processes, on any machines that see both folders,
    write every N-th part each, and the last one to finish completes the data set. `selection` chooses classes and the
    validation split; `origin` is only recorded, also in a finished data set.

    Raises:
        DataError: the source's layout is unknown or an archive is corrupt, or the target is in use, lacks disk space
            or contains something else.
    """
    target = target.absolute()
    _check_folders(source.absolute(), target)
    with work_folder(target, share) as work:
        with FileLock(work / "scan"):  # one share at a time: a scan may spool images to the working folder
            scan = detect_layout(source, layout).scan(source.absolute(), work, pool)
        scan = select(scan, selection)
        require_two_classes(scan.classes, source)
        notes = scan.notes()
        job = job_hash(scan, options)
        finished = read_manifest(target)
        if finished is not None:
            if finished.made.get("job") != job:
                raise DataError(
                    f"{target} already contains a data set of other images, of other options, or in the sample order "
                    f"of an earlier version: choose another folder."
                )
            finished = _with_origin(finished, target, origin)
            return PrepareResult(finished, 0, 0, finished.made["ignored"], notes=notes)
        with FileLock(work / "turn"):
            message = (
                f"{target} contains an unfinished preparation of other images, with other options, with another number "
                f"of shares or by an earlier version, whose sample order differs: repeat that command, with that "
                f"version, or remove {target} to start from scratch."
            )
            check_same_job(work, f"{job} {share[1]}", message)
        if options.to == "folders":
            for split, table in scan.splits.items():
                _check_names(table, split)
        parts = [Part(scan.root, target, split, 0, options, skip_corrupt, max_pixels) for split in scan.splits]
        tasks = [task for part in parts for task in divide(scan.splits[part.split], part)]
        scan = replace(scan, splits={})  # for 10^7 images the tables are gigabytes: when the parts are written, they go
        parts = [part for part, _ in tasks]
        share_parts = parts[share[0] :: share[1]]
        corrupt, reused = write_parts(tasks[share[0] :: share[1]], work, pool)
        del tasks
        corrupt = unreadable_files(scan) + corrupt
        if corrupt and not skip_corrupt:
            raise corrupt_images(corrupt, source)
        with FileLock(work / "turn"):
            manifest = read_manifest(target)  # another share may have completed the data set meanwhile
            missing = [] if manifest else [part for part in parts if not is_finished(part)]
            if not manifest and not missing:
                manifest = _complete(scan, parts, target, options, selection, origin, job)
        skipped = manifest.made["ignored"] if manifest else corrupt
        return PrepareResult(manifest, len(share_parts), reused, skipped, len(missing), notes)


def write_parts(tasks: list[tuple[Part, Rows]], work: Path, pool: Pool) -> tuple[list[str], int]:
    """Writes all unfinished parts; returns their corrupt images and the number of parts that were finished."""
    pending = [(part, rows) for part, rows in tasks if not is_finished(part)]
    for part, _ in pending:
        for leftover in work.glob(f"{part.label}.*.tmp"):
            leftover.unlink()
        (part.target / part.split).mkdir(exist_ok=True)
    check_disk_space(pending)
    results = pool.map(write_part, pending, "preparing", [rows.bytes for _, rows in pending])
    return [line for result in results for line in result.corrupt], len(tasks) - len(pending)


def corrupt_images(lines: list[str], source: Path) -> DataError:
    """Returns the error that names corrupt images, after all others are written."""
    return DataError(
        f"{len(lines)} corrupt images in {source}:\n  " + listed(lines, "\n  ") + "\nAll others are written. Fix these "
        "and repeat the command, or skip them with --skip-corrupt."
    )


def unreadable_files(scan: Scan) -> list[str]:
    """Returns a line for each file that the scan could not read."""
    return [
        f"{path} in {scan.root}: {problem}" for problems in scan.problems.values() for path, problem in problems.items()
    ]


def _check_folders(source: Path, target: Path) -> None:
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise DataError(f"the target {target} must not be inside the source {source}: choose another folder.")
    if target.is_dir():
        others = [name for name in sorted(os.listdir(target)) if name not in (WORK, MANIFEST)]
        if others and not (target / WORK).is_dir() and not (target / MANIFEST).is_file():
            raise DataError(f"{target} is not empty (it contains {listed(others)}): choose an empty or a new folder.")


@contextmanager
def work_folder(target: Path, share: tuple[int, int]) -> Iterator[Path]:
    """Yields the working folder in the target to one process per share; removes it when the data set is complete."""
    work = target / WORK
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


def job_hash(scan: Scan, options: PrepareOptions) -> str:
    """Returns a hash of everything that determines the output."""
    order = ORDER_VERSION if options.to == "shards" else None
    digest = hashlib.sha256(json.dumps([scan.layout, scan.classes, asdict(options), order]).encode())
    for split, table in scan.splits.items():
        digest.update(split.encode())
        for name in ("path", "name"):
            for start in range(0, len(table), _HASH_ROWS):
                names = table[name].slice(start, _HASH_ROWS).to_pylist()
                digest.update(("\0" * (start > 0) + "\0".join(names)).encode())
        for name in ("offset", "length", "label"):
            digest.update(table[name].to_numpy())
    return digest.hexdigest()


def check_same_job(work: Path, job: str, message: str) -> None:
    """Records the job of a new target; raises `DataError` with the message if an unfinished target has another job."""
    record = work / "job"
    if not record.is_file():
        write_text(record, job)
    elif record.read_text(encoding="utf-8") != job:
        raise DataError(message)


def _check_names(table: pa.Table, split: str) -> None:
    """Raises `DataError` unless every image has a unique file name in a class folder."""
    names = table["name"]
    valid = pc.and_not(
        pc.match_substring_regex(names, r"^[^/]+/[^/]+$"), pc.match_substring_regex(names, r"(^|/)\.\.?(/|$)")
    )
    invalid = names.filter(pc.invert(valid))
    if len(invalid):
        raise DataError(
            f"the {split} split's classes cannot be folder names ({listed(invalid.to_pylist())}): prepare shards."
        )
    counts = pc.value_counts(file_names(names))
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(repeated):
        raise DataError(
            f"the {split} split has images of the same class and name ({listed(repeated.to_pylist())}): prepare shards."
        )


def _complete(
    scan: Scan,
    parts: list[Part],
    target: Path,
    options: PrepareOptions,
    selection: Selection,
    origin: Origin,
    job: str,
) -> Manifest:
    """Writes the indexes of all parts, the data card, and then the manifest, which marks the data set as complete."""
    splits = {}
    for split in dict.fromkeys(part.split for part in parts):
        split_parts = [part for part in parts if part.split == split]
        table, shards = join_records(split_parts)
        _check_classes(table, scan.classes, split)
        splits[split] = save_split(target, split, table, scan.classes, shards)
    results = [read_record(part) for part in parts]
    made = origin.to_json() | {
        "from": scan.layout,
        "job": job,
        **asdict(options),
        "converted": sum(result.converted for result in results),
        "ignored": unreadable_files(scan) + [line for result in results for line in result.corrupt],
        "not_taken": scan.ignored.lines(),
    }
    if selection.to_json():
        made["selection"] = selection.to_json()
    manifest = Manifest(options.to, scan.classes, splits, made)
    write_data_card(target, manifest)
    manifest.save(target)
    return manifest


def _with_origin(manifest: Manifest, target: Path, origin: Origin) -> Manifest:
    """Records license and source in a finished data set, if they are new."""
    if manifest.made | origin.to_json() == manifest.made:
        return manifest
    manifest = replace(manifest, made=manifest.made | origin.to_json())
    write_data_card(target, manifest)
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
