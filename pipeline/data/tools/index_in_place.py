"""`densenet data index`: indexes existing class folders, shards or ImageNet archives without copying them."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config_data import MAX_PIXELS
from pipeline.data.class_names import require_two_classes
from pipeline.data.dataset import MANIFEST, Manifest, Split, index_file, save_split
from pipeline.data.index import Shard
from pipeline.data.tables import SCHEMA
from pipeline.data.tools.image_checks import check_images, iter_chunks
from pipeline.data.tools.layouts import detect_layout
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.selection import EVERYTHING, Selection, select
from pipeline.errors import DataError, listed


def index_in_place(
    root: Path,
    pool: Pool,
    layout: str | None = None,
    max_pixels: int = MAX_PIXELS,
    selection: Selection = EVERYTHING,
) -> tuple[Manifest, list[str]]:
    """Reads all images' bytes, and writes `dataset.json` and the indexes with sizes and checksums into `root`.

    `selection` chooses classes and the validation split; both splits may have images in the same archives. Returns the
    manifest, and notes on ignored files and doubtful classes.

    Raises:
        DataError: the layout is not recognized, images are corrupt, or `root` is not writable.
    """
    root = root.absolute()
    source_layout = detect_layout(root, layout)
    if source_layout.name == "prepared":
        raise DataError(f"{root} is already indexed: remove {MANIFEST} to index it again.")
    scan = select(source_layout.scan(root, None, pool), selection)
    require_two_classes(scan.classes, root)
    splits, in_shards = {}, source_layout.name in ("ilsvrc", "webdataset", "wordnet-tars")
    hashes: dict[str, Shard] = {}
    for split, table in scan.splits.items():
        if in_shards:
            order = np.lexsort((table["offset"].to_numpy(), table["path"].cast(pa.string()).to_numpy()))
            table = table.take(order)
        tasks = list(iter_chunks(root, split, table, decode=False, max_pixels=max_pixels))
        task_bytes = [task.rows.bytes for task in tasks]
        checks = pool.map(check_images, tasks, f"indexing {split}", task_bytes)
        corrupt = [f"{path}: {problem}" for path, problem in scan.problems.get(split, {}).items()]
        corrupt += [f"{f.where}: {f.detail}" for check in checks for f in check.findings if f.is_error]
        if corrupt:
            raise DataError(
                f"{len(corrupt)} corrupt images in {split}:\n  " + listed(corrupt, "\n  ") + "\nReplace or remove them."
            )
        columns = {
            "width": np.concatenate([check.widths_N for check in checks]),
            "height": np.concatenate([check.heights_N for check in checks]),
            "crc32": np.concatenate([check.crc32_N for check in checks]),
        } | ({} if in_shards else {"name": pa.nulls(len(table), pa.string())})
        for name, values in columns.items():
            i = SCHEMA.get_field_index(name)
            table = table.set_column(i, SCHEMA.field(i), pa.array(values, SCHEMA.field(i).type))
        paths = pc.unique(table["path"]).to_pylist() if in_shards else []
        new = [path for path in paths if path not in hashes]
        hashes |= zip(new, pool.map(_hash, [root / path for path in new], f"hashing {split}"), strict=True)
        splits[split] = _save(root, split, table, scan.classes, {path: hashes[path] for path in paths})
    made: dict[str, Any] = {"from": source_layout.name, "to": "index", "not_taken": scan.ignored.lines()}
    if selection.to_json():
        made["selection"] = selection.to_json()
    manifest = Manifest("shards" if in_shards else "folders", scan.classes, splits, made)
    manifest.save(root)
    return manifest, scan.notes()


def _save(root: Path, split: str, table: pa.Table, classes: tuple[str, ...], shards: dict[str, Shard]) -> Split:
    try:
        return save_split(root, split, table, classes, shards)
    except OSError as error:
        raise DataError(
            f"{index_file(root, split)} cannot be written: {error.strerror or error}. Class folders need no index for "
            f"training."
        ) from error


def _hash(file: Path) -> Shard:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Shard(stream.tell(), digest)
