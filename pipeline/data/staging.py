"""Remote data: fetches the indexes of a data set at a URI, and stages shards on a node's local disk."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock

from pipeline.config_data import Data
from pipeline.data.dataset import MANIFEST, open_index, parse_manifest
from pipeline.data.index import DatasetIndex, Shard
from pipeline.data.index_file import names_file
from pipeline.data.sources import PARALLEL_COPIES, copy_shard, errors_name_uri
from pipeline.data.space import check_space
from pipeline.errors import DataError
from pipeline.extension_points import is_generated
from pipeline.files import PARTIAL_PREFIX, atomic_file, write_text

_ATTEMPTS = 2


def is_remote(root: str | None) -> bool:
    """Whether a data root is a URI (`s3://bucket/set`), not a folder or a generated data set."""
    return root is not None and "://" in root and not is_generated(root)


def remote_cache_folder(root: str, cache: Path) -> Path:
    """Returns the local folder for manifest and indexes of a data set at a URI."""
    return cache / f"remote-{hashlib.sha256(root.encode()).hexdigest()[:16]}"


def fetch_indexes(root: str, splits: tuple[str, ...], cache: Path) -> list[DatasetIndex]:
    """Fetches the indexes of a data set at a URI; its shards are readable only after `stage`.

    Raises:
        DataError: the URI does not exist, or is not a prepared data set in shards.
    """
    folder = remote_cache_folder(root, cache)
    (folder / "index").mkdir(parents=True, exist_ok=True)
    with errors_name_uri(root):
        files, base = fsspec.core.url_to_fs(root)
        text = files.cat_file(f"{base}/{MANIFEST}").decode()
        manifest = parse_manifest(text, f"{root}/{MANIFEST}")
        if manifest.layout != "shards":
            raise DataError(f"{root} has class folders, but a data set at a URI must be in shards: prepare shards.")
        write_text(folder / MANIFEST, text)
        for split in splits:
            if split in manifest.splits:
                _fetch_index(files, base, folder, manifest.splits[split].index)
    return [open_index(folder, manifest, split) for split in splits]


def _fetch_index(files: Any, base: str, folder: Path, name: str) -> None:
    index = folder / name
    for file in [index] if index.suffix == ".parquet" else [index, names_file(index)]:
        with atomic_file(file) as temporary:
            files.get_file(f"{base}/{file.relative_to(folder).as_posix()}", str(temporary))


def stage(index: DatasetIndex, source: str, base: Path) -> DatasetIndex:
    """Copies an index's shards from `source` (a folder or a URI) below `base`, and returns the index of the copy.

    The index's own address, if it has one, replaces `source`.

    Of several processes on a node, one copies and the others wait. A shard's SHA-256 is checked before the shard is
    renamed to its final name, so an existing shard is complete; it is not copied again.

    Raises:
        DataError: the data are not in shards, there is too little disk space, or a shard is missing or corrupt.
    """
    if not index.shards:
        raise DataError(
            f"data.stage copies shards, but {source} has class folders: prepare shards or unset data.stage."
        )
    source, folder = index.address or source, base / index.fingerprint[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"), ThreadPoolExecutor(PARALLEL_COPIES, "stage") as pool:
            missing = {name: shard for name, shard in index.shards.items() if not _is_staged(folder / name, shard)}
            check_space(folder, sum(shard.bytes for shard in missing.values()), "the staged shards")
            with errors_name_uri(source):
                files, root = fsspec.core.url_to_fs(source)
                list(pool.map(lambda item: _copy(files, root, folder, *item), missing.items()))
    except OSError as error:
        raise DataError(f"data.stage={base}: {error.filename or ''} {error.strerror or error}.") from error
    return index.with_root(folder)


def require_stage(address: str | None, root: str, stage: object, key: str = "data.stage") -> None:
    """Raises `DataError` if a data set's shards are at another address, and there is no folder to copy them to."""
    if address is not None and stage is None:
        raise DataError(
            f"{root} is an index of the shards at {address}: set {key} to a folder on each node's own disk, to which "
            f"they are copied before their use."
        )


def stage_splits(data: Data, train_index: DatasetIndex, val_index: DatasetIndex) -> tuple[DatasetIndex, DatasetIndex]:
    """Stages both splits where `data.stage` is set; a training split that is streamed (`Data.streams`) stays as it is.

    Raises:
        DataError: as `stage`.
    """
    if data.stage is None:
        return train_index, val_index
    source, base = str(data.root), Path(data.stage)
    if not data.streams:
        train_index = stage(train_index, source, base)
    return train_index, stage(val_index, source, base)


def _is_staged(file: Path, shard: Shard) -> bool:
    return file.is_file() and file.stat().st_size == shard.bytes


def _copy(files: Any, root: str, folder: Path, name: str, shard: Shard) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    # Under the lock, so the fixed name overwrites what a killed process left.
    with atomic_file(target, target.with_name(f"{PARTIAL_PREFIX}{target.name}")) as temporary:
        for _ in range(_ATTEMPTS):
            if copy_shard(files, root, name, temporary).sha256 == shard.sha256:
                return
        raise DataError(
            f"shard {name} does not match its SHA-256: run `densenet data verify` on the source, or index it again if "
            f"it has changed."
        )
