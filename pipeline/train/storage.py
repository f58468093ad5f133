"""Checkpoint storage: an object store (S3, ...) or a shared folder for copies of a run's checkpoints."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from pipeline.config import RunConfig
from pipeline.errors import CheckpointFormatError, TrainingError, UserError
from pipeline.extras import install_hint
from pipeline.train import checkpoint
from pipeline.train.checkpoint import MANIFEST


class StorageError(TrainingError):
    """The checkpoint storage is unreachable or refuses access; a retry may succeed."""


class Storage:
    """The checkpoints of the run `name` below `uri`: a folder or any URI that fsspec supports (`s3://bucket/runs`).

    A checkpoint exists when its manifest does: the manifest is copied last, and removed first. All methods raise
    `StorageError`.
    """

    def __init__(self, uri: str, name: str) -> None:
        self._uri = uri
        with self._naming_uri():
            self._fs, base = fsspec.core.url_to_fs(uri)
            self._base = f"{base.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """Returns the names of the stored checkpoints, oldest first."""
        with self._naming_uri():
            self._fs.invalidate_cache()
            manifests = self._fs.glob(f"{self._base}/{checkpoint.PREFIX}*/{MANIFEST}")
        return sorted(str(path).split("/")[-2] for path in manifests)

    def check(self) -> None:
        """Checks write access: writes a small file and removes it."""
        probe = f"{self._base}/.probe"
        with self._naming_uri():
            if isinstance(self._fs, LocalFileSystem):
                self._fs.makedirs(self._base, exist_ok=True)
            self._fs.pipe_file(probe, b"densenet")
            self._fs.rm_file(probe)

    def put(self, folder: Path) -> None:
        """Uploads a committed checkpoint."""
        target = f"{self._base}/{folder.name}"
        with self._naming_uri():
            if isinstance(self._fs, LocalFileSystem):
                self._fs.makedirs(target, exist_ok=True)
            for name in [*checkpoint.manifest_entries(folder), MANIFEST]:
                self._fs.put_file(str(folder / name), f"{target}/{name}")

    def get(self, name: str, root: Path) -> str | None:
        """Downloads a checkpoint into `root`, once per node; returns what is wrong with it, or None."""
        folder = root / name
        partial = checkpoint.partial_folder(folder)
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "fetch.lock"):
            if checkpoint.verify(folder) is None:
                return None
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                with self._naming_uri():
                    self._fs.get_file(f"{self._base}/{name}/{MANIFEST}", str(partial / MANIFEST))
                    with contextlib.suppress(ValueError, CheckpointFormatError):  # `verify` finds it below
                        for entry in checkpoint.manifest_entries(partial):
                            with contextlib.suppress(FileNotFoundError):
                                self._fs.get_file(f"{self._base}/{name}/{entry}", str(partial / entry))
                problem = checkpoint.verify(partial)
                if problem is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    partial.rename(folder)
                return problem
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Removes a stored checkpoint."""
        with self._naming_uri():
            self._fs.rm_file(f"{self._base}/{name}/{MANIFEST}")
            self._fs.rm(f"{self._base}/{name}", recursive=True)

    @contextlib.contextmanager
    def _naming_uri(self) -> Iterator[None]:
        """Converts errors of the file system to a `StorageError` that names the URI."""
        try:
            yield
        except StorageError:
            raise
        except ImportError as error:
            raise StorageError(
                f"checkpoint.storage={self._uri} needs a package that is not installed ({error}); for S3: "
                f"{install_hint('s3')}"
            ) from error
        except Exception as error:  # each file system raises errors of its own
            reason = (str(error).splitlines() or [""])[0]
            raise StorageError(f"checkpoint.storage={self._uri}: {type(error).__name__}: {reason}") from error


def checkpoint_storage(config: RunConfig) -> Storage | None:
    """Returns the storage of `checkpoint.storage`, or None."""
    uri = config.checkpoint.storage
    return None if uri is None else Storage(uri, str(config.run.name))


def fetch_checkpoints(config: RunConfig, run_dir: Path) -> None:
    """Downloads a run's latest and best checkpoint from `checkpoint.storage`, if it is set and has them.

    Raises:
        StorageError: the storage is unreachable.
    """
    storage, root = checkpoint_storage(config), checkpoint.checkpoint_root(run_dir)
    stored = [] if storage is None else storage.names()
    if storage is not None and stored and storage.get(stored[-1], root) is None:
        best = checkpoint.best_checkpoint_name(root / stored[-1])
        if best in stored:
            storage.get(best, root)


def fetch_checkpoints_or_warn(config: RunConfig, run_dir: Path, warn: Callable[[str], None]) -> None:
    """Calls `fetch_checkpoints` after training; only warns if the storage is unreachable.

    Raises:
        UserError: the storage is unreachable, and this machine has no checkpoints.
    """
    try:
        fetch_checkpoints(config, run_dir)
    except StorageError as error:
        if not checkpoint.checkpoints(checkpoint.checkpoint_root(run_dir)):
            raise UserError(
                f"{error}. The training is complete, and its checkpoints are in the storage: when it is reachable, "
                f"`densenet models register {run_dir}` registers the best one without training again."
            ) from error
        warn(f"{error}; the checkpoints on this machine are used")
