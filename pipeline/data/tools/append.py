"""`densenet data append`: adds images to a prepared data set in shards, as new shards after the existing ones.

The new shards, the new indexes and the data card are written first and `dataset.json` last, so that a data set is
either the old or the new one. Old shards and indexes stay as they are.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from pipeline.config_data import MAX_PIXELS
from pipeline.data.class_names import to_nfc
from pipeline.data.dataset import MANIFEST, Manifest, open_index, read_manifest, save_split
from pipeline.data.tools.data_card import UNKNOWN, Origin, write_data_card
from pipeline.data.tools.layouts import detect_layout
from pipeline.data.tools.parts import Part, PrepareOptions, divide, join_records, read_record
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import (
    check_same_job,
    corrupt_images,
    job_hash,
    unreadable_files,
    work_folder,
    write_parts,
)
from pipeline.data.tools.scan import Scan
from pipeline.errors import DataError, listed


@dataclass(frozen=True)
class AppendResult:
    """The new manifest; new images by split, images that were already there, and notes on ignored files.

    `is_repeated`: an earlier command had appended these images, and nothing was written.
    """

    manifest: Manifest
    images: dict[str, int]
    skipped_existing: int
    skipped_corrupt: list[str]
    notes: list[str]
    is_repeated: bool = False


def append(
    source: Path,
    target: Path,
    pool: Pool,
    layout: str | None = None,
    skip_existing: bool = False,
    skip_corrupt: bool = False,
    max_pixels: int = MAX_PIXELS,
    origin: Origin = UNKNOWN,
) -> AppendResult:
    """Adds the images of a source to the data set in `target`, with the options that it was prepared with.

    A source may have only a training split. With `skip_existing`, images whose name exists in their class and split are
    skipped. After an interruption, the same call completes the work.

    Raises:
        DataError: the target is not a prepared data set in shards, the source has classes that it lacks or images that
            it has, images are corrupt, or disk space is insufficient.
    """
    target = target.absolute()
    manifest = _prepared_in_shards(target)
    options = PrepareOptions(**{key: manifest.made[key] for key in PrepareOptions.__dataclass_fields__})
    with work_folder(target, (0, 1)) as work:
        with FileLock(work / "scan"):
            scan = detect_layout(source, layout).scan(source.absolute(), work, pool)
        job, notes = job_hash(scan, options), [f"ignored: {line}" for line in scan.ignored.lines()]
        for earlier in manifest.made.get("appended", ()):
            if earlier["job"] == job:
                return AppendResult(manifest, earlier["images"], 0, earlier["ignored"], notes, is_repeated=True)
        scan = _with_labels_of(manifest, scan, target)
        scan, existing = _new_images(scan, manifest, target, skip_existing)
        message = f"{target} contains the unfinished append of another source: repeat that command, or remove {work}."
        _forget_finished_job(work, manifest)
        check_same_job(work, f"append {job}", message)
        tasks = [
            task
            for split, table in scan.splits.items()
            if len(table)
            for task in divide(table, _first_part(scan, split, manifest, target, options, skip_corrupt, max_pixels))
        ]
        parts = [part for part, _ in tasks]
        scan = replace(scan, splits={})  # the tables are freed with the tasks
        corrupt, _ = write_parts(tasks, work, pool)
        del tasks
        corrupt = unreadable_files(scan) + corrupt
        if corrupt and not skip_corrupt:
            raise corrupt_images(corrupt, source)
        manifest = _complete(scan, parts, manifest, target, origin, job)
        appended = manifest.made["appended"][-1]
        return AppendResult(manifest, appended["images"], existing, appended["ignored"], notes)


def _prepared_in_shards(target: Path) -> Manifest:
    manifest = read_manifest(target)
    if manifest is None:
        raise DataError(f"{target} has no {MANIFEST}: give a data set that `densenet data prepare` has completed.")
    if manifest.made.get("to") != "shards":
        raise DataError(
            f"{target} was not written as shards by `densenet data prepare` (made.to={manifest.made.get('to')}): "
            f"prepare a new set from both sources."
        )
    return manifest


def _forget_finished_job(work: Path, manifest: Manifest) -> None:
    """Removes the record of a job that was complete when its process was killed."""
    record = work / "job"
    finished = {manifest.made["job"], *(earlier["job"] for earlier in manifest.made.get("appended", ()))}
    if record.is_file() and finished & set(record.read_text(encoding="utf-8").split()):
        record.unlink()


def _first_part(
    scan: Scan,
    split: str,
    manifest: Manifest,
    target: Path,
    options: PrepareOptions,
    skip_corrupt: bool,
    max_pixels: int,
) -> Part:
    """Returns the part with the number after the split's last shard."""
    numbers = [int(Path(path).stem.rpartition("-")[2]) for path in manifest.splits[split].shards]
    return Part(scan.root, target, split, max(numbers, default=-1) + 1, options, skip_corrupt, max_pixels)


def _with_labels_of(manifest: Manifest, scan: Scan, target: Path) -> Scan:
    """Returns the scan with the data set's labels.

    Raises:
        DataError: classes or splits are new.
    """
    unknown = [name for name in scan.classes if to_nfc(name) not in set(manifest.classes)]
    if unknown:
        raise DataError(
            f"{scan.root} has {len(unknown):,} classes that {target} lacks: {listed(unknown)}. New classes change the "
            f"labels in its shards and in models that were trained on it: prepare a new set from both sources."
        )
    new_splits = [split for split in scan.splits if split not in manifest.splits]
    if new_splits:
        raise DataError(f"{target} has no split {listed(new_splits)}, it has {listed(list(manifest.splits))}.")
    ranks = {name: label for label, name in enumerate(manifest.classes)}
    labels_K = np.array([ranks[to_nfc(name)] for name in scan.classes], np.int32)
    splits = {}
    for split, table in scan.splits.items():
        i = table.schema.get_field_index("label")
        splits[split] = table.set_column(i, table.schema.field(i), pa.array(labels_K[table["label"].to_numpy()]))
    return replace(scan, classes=manifest.classes, splits=splits)


def _new_images(scan: Scan, manifest: Manifest, target: Path, skip_existing: bool) -> tuple[Scan, int]:
    """Returns the scan without images that exist in the data set, and their number.

    Raises:
        DataError: some exist and must not be skipped, or none is new.
    """
    splits, existing, examples = {}, 0, []
    for split, table in scan.splits.items():
        names = open_index(target, manifest, split).to_table()["name"]
        is_old = pc.is_in(table["name"], value_set=names.combine_chunks())
        splits[split] = table.filter(pc.invert(is_old)).combine_chunks()
        existing += len(table) - len(splits[split])
        examples += [f"{split}/{name}" for name in table["name"].filter(is_old).slice(0, 10).to_pylist()]
    if existing and not skip_existing:
        raise DataError(
            f"{target} has {existing:,} of these images already, by their names: {listed(examples)}. Skip them with "
            f"--skip-existing, or rename them if they are others."
        )
    if not any(map(len, splits.values())):
        raise DataError(f"{scan.root} has no image that {target} lacks: there is nothing to append.")
    return replace(scan, splits=splits), existing


def _complete(scan: Scan, parts: list[Part], old: Manifest, target: Path, origin: Origin, job: str) -> Manifest:
    """Writes the new indexes, the data card, and then the manifest, which makes the new images a part of the set."""
    generation = len(old.made.get("appended", ())) + 1
    splits, images = dict(old.splits), {}
    for split in dict.fromkeys(part.split for part in parts):
        table, shards = join_records([part for part in parts if part.split == split])
        images[split] = len(table)
        before = open_index(target, old, split, check=True).to_table()
        table = pa.concat_tables([before, table]).unify_dictionaries().combine_chunks()
        shards = old.splits[split].shards | shards
        splits[split] = save_split(target, f"{split}-{generation}", table, old.classes, shards)
    results = [read_record(part) for part in parts]
    appended: dict[str, Any] = origin.to_json() | {
        "from": scan.layout,
        "job": job,
        "images": images,
        "ignored": unreadable_files(scan) + [line for result in results for line in result.corrupt],
        "not_taken": scan.ignored.lines(),
    }
    made = old.made | {
        "converted": old.made["converted"] + sum(result.converted for result in results),
        "appended": [*old.made.get("appended", ()), appended],
    }
    manifest = Manifest(old.layout, old.classes, splits, made)
    write_data_card(target, manifest)
    manifest.save(target)
    return manifest
