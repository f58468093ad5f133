"""`densenet data index`: an index beside data that stays where it is: class folders, shards, ImageNet's archives."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import MAX_PIXELS
from pipeline.data.class_names import require_two_classes
from pipeline.data.dataset import MANIFEST, Manifest, Split, index_file
from pipeline.data.index import SCHEMA, Shard, save_table
from pipeline.data.tools.inspect import chunks, look
from pipeline.data.tools.layouts import recognize
from pipeline.data.tools.pool import Pool
from pipeline.errors import DataError, listed


def index_in_place(
    root: Path, pool: Pool, layout: str | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Manifest, list[str]]:
    """Reads all images' bytes, and writes `dataset.json` and the indexes with sizes and checksums into `root`.

    Returns the manifest, and lines on what is not taken or is doubtful.

    Raises:
        DataError: the layout is not understood, images are corrupt, or nothing can be written in `root`.
    """
    root = root.absolute()
    found = recognize(root, layout)
    if found.name == "prepared":
        raise DataError(f"{root} has an index already: remove {MANIFEST} to make it anew.")
    scan = found.scan(root, None, pool)
    require_two_classes(scan.classes, root)
    splits, in_shards = {}, found.name in ("ilsvrc", "webdataset")
    for split, table in scan.splits.items():
        if in_shards:
            order = np.lexsort((table["offset"].to_numpy(), table["path"].cast(pa.string()).to_numpy()))
            table = table.take(order)
        tasks = list(chunks(root, split, table, decoded=False, max_pixels=max_pixels))
        parts = pool.map(look, tasks, f"indexing {split}", [pc.sum(task.table["length"]).as_py() for task in tasks])
        corrupt = [f"{path}: {problem}" for path, problem in scan.problems.get(split, {}).items()]
        corrupt += [f"{f.where}: {f.detail}" for part in parts for f in part.findings if f.is_corruption]
        if corrupt:
            raise DataError(
                f"{len(corrupt)} corrupt images in {split}:\n  " + listed(corrupt, "\n  ") + "\nReplace or remove them."
            )
        columns = {
            "width": np.concatenate([part.widths_N for part in parts]),
            "height": np.concatenate([part.heights_N for part in parts]),
            "crc32": np.concatenate([part.crc32_N for part in parts]),
        } | ({} if in_shards else {"name": pa.nulls(len(table), pa.string())})
        for name, values in columns.items():
            i = SCHEMA.get_field_index(name)
            table = table.set_column(i, SCHEMA.field(i), pa.array(values, SCHEMA.field(i).type))
        _save(table, index_file(root, split))
        paths = pc.unique(table["path"]).to_pylist() if in_shards else []
        hashes = pool.map(_hash, [root / path for path in paths], f"hashing {split}")
        splits[split] = Split(len(table), pc.sum(table["length"]).as_py(), dict(zip(paths, hashes, strict=True)))
    made = {"from": found.name, "to": "index", "not_taken": scan.ignored.lines()}
    manifest = Manifest("shards" if in_shards else "folders", scan.classes, splits, made)
    manifest.save(root)
    return manifest, scan.notes()


def _save(table: pa.Table, file: Path) -> None:
    try:
        file.parent.mkdir(exist_ok=True)
        save_table(table, file)
    except OSError as error:
        raise DataError(
            f"{file} cannot be written: {error.strerror or error}. Class folders can be trained on without an index."
        ) from error


def _hash(file: Path) -> Shard:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Shard(stream.tell(), digest)
