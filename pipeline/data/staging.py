"""Data that lie elsewhere: indexes of a remote data set, and shards copied to a node's own disk."""

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock

from pipeline.data.dataset import MANIFEST, open_index, parse_manifest
from pipeline.data.index import DatasetIndex, Shard
from pipeline.data.space import check_space
from pipeline.errors import DataError
from pipeline.extension_points import is_generated
from pipeline.extras import install_hint
from pipeline.files import PARTIAL_PREFIX, atomic_file

_COPIES = 8  # shards at once: object stores give a single stream only a part of what they can
_BLOCK = 8 << 20
_TRIES = 2


def is_remote(root: str | None) -> bool:
    """Whether a data root is an address (`s3://bucket/set`), and neither a folder nor made here."""
    return root is not None and "://" in root and not is_generated(root)


def remote_folder(root: str, cache: Path) -> Path:
    """Where manifest and indexes of a data set at an address are kept."""
    return cache / f"remote-{hashlib.sha256(root.encode()).hexdigest()[:16]}"


def fetch_indexes(root: str, splits: tuple[str, ...], cache: Path) -> list[DatasetIndex]:
    """Indexes of a data set at an address; they lead nowhere until they are staged.

    Raises:
        DataError: nothing is there, or it is no prepared data set in shards.
    """
    folder = remote_folder(root, cache)
    (folder / "index").mkdir(parents=True, exist_ok=True)
    with _naming_address(root):
        files, base = fsspec.core.url_to_fs(root)
        text = files.cat_file(f"{base}/{MANIFEST}").decode()
        manifest = parse_manifest(text, f"{root}/{MANIFEST}")
        if manifest.layout != "shards":
            raise DataError(f"{root} holds class folders: only shards are read from an address. Prepare shards.")
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        for split in splits:
            if split in manifest.splits:
                files.get_file(f"{base}/index/{split}.parquet", str(folder / "index" / f"{split}.parquet"))
    return [open_index(folder, manifest, split) for split in splits]


def stage(index: DatasetIndex, source: str, base: Path) -> DatasetIndex:
    """Copies an index's shards from `source` (a folder or an address) below `base`, and returns the index of the copy.

    Of several processes on a node one copies and the others wait. Each shard is compared with its hash before it gets
    its name, so that one that is there is whole; what an earlier start has copied is not copied again.

    Raises:
        DataError: the data are not in shards, there is no room, or a shard is missing or comes corrupt each time.
    """
    if not index.shards:
        raise DataError(
            f"data.stage copies shards, but {source} holds class folders: prepare shards or unset data.stage."
        )
    folder = base / index.fingerprint[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"), ThreadPoolExecutor(_COPIES, "stage") as pool:
            missing = {name: shard for name, shard in index.shards.items() if not _is_there(folder / name, shard)}
            check_space(folder, sum(shard.bytes for shard in missing.values()), "the staged shards")
            with _naming_address(source):
                files, root = fsspec.core.url_to_fs(source)
                list(pool.map(lambda item: _copy(files, root, folder, *item), missing.items()))
    except OSError as error:
        raise DataError(f"data.stage={base}: {error.filename or ''} {error.strerror or error}.") from error
    return index.moved(folder)


def _is_there(file: Path, shard: Shard) -> bool:
    return file.is_file() and file.stat().st_size == shard.bytes


def _copy(files: Any, root: str, folder: Path, name: str, shard: Shard) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    # Under the lock, so what a killed process has left under this name is written over.
    with atomic_file(target, target.with_name(f"{PARTIAL_PREFIX}{target.name}")) as aside:
        for _ in range(_TRIES):
            digest = hashlib.sha256()
            with files.open(f"{root}/{name}", "rb") as source, aside.open("wb") as out:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    out.write(block)
            if digest.hexdigest() == shard.sha256:
                return
        raise DataError(f"shard {name} does not have the hash it was prepared with: `densenet data verify` the source.")


@contextlib.contextmanager
def _naming_address(address: str) -> Iterator[None]:
    """Turns what file systems raise into an error that names the address."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"{address} needs a package that is not installed ({error}); for S3: {install_hint('s3')}"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{address}: {error} is not there. Give a data set made by `densenet data prepare`.") from error
    except Exception as error:  # each kind of storage raises errors of its own
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{address} cannot be read: {type(error).__name__}: {reason}") from error
