"""A second place for a run's checkpoints: an object store or a folder that outlives the nodes."""

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
    """The place does not answer, or refuses; it may later."""


class Storage:
    """The checkpoints of the run `name` below `address`, a folder or whatever fsspec knows (`s3://bucket/runs`).

    A checkpoint is there when its manifest is: that is copied last, and removed first. All methods raise
    `StorageError`.
    """

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        with self._naming_address():
            self._files, base = fsspec.core.url_to_fs(address)
            self._base = f"{base.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """The names of the checkpoints that are there, oldest first."""
        with self._naming_address():
            self._files.invalidate_cache()
            manifests = self._files.glob(f"{self._base}/{checkpoint.PREFIX}*/{MANIFEST}")
        return sorted(str(path).split("/")[-2] for path in manifests)

    def check(self) -> None:
        """Writes a small file and removes it again."""
        place = f"{self._base}/.probe"
        with self._naming_address():
            if isinstance(self._files, LocalFileSystem):
                self._files.makedirs(self._base, exist_ok=True)
            self._files.pipe_file(place, b"densenet")
            self._files.rm_file(place)

    def put(self, folder: Path) -> None:
        """Copies a committed checkpoint."""
        target = f"{self._base}/{folder.name}"
        with self._naming_address():
            if isinstance(self._files, LocalFileSystem):
                self._files.makedirs(target, exist_ok=True)
            for name in [*checkpoint.entries(folder), MANIFEST]:
                self._files.put_file(str(folder / name), f"{target}/{name}")

    def get(self, name: str, root: Path) -> str | None:
        """Copies a checkpoint below the folder `root`, once for all processes of a node; says what is wrong with it."""
        folder = root / name
        partial = checkpoint.partial(folder)
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "fetch.lock"):
            if checkpoint.verify(folder) is None:
                return None
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                with self._naming_address():
                    self._files.get_file(f"{self._base}/{name}/{MANIFEST}", str(partial / MANIFEST))
                    with contextlib.suppress(ValueError, CheckpointFormatError):  # `verify` finds it below
                        for entry in checkpoint.entries(partial):
                            with contextlib.suppress(FileNotFoundError):
                                self._files.get_file(f"{self._base}/{name}/{entry}", str(partial / entry))
                problem = checkpoint.verify(partial)
                if problem is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    partial.rename(folder)
                return problem
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Removes a checkpoint."""
        with self._naming_address():
            self._files.rm_file(f"{self._base}/{name}/{MANIFEST}")
            self._files.rm(f"{self._base}/{name}", recursive=True)

    @contextlib.contextmanager
    def _naming_address(self) -> Iterator[None]:
        """Turns what file systems raise into an error that names the address."""
        try:
            yield
        except StorageError:
            raise
        except ImportError as error:
            raise StorageError(
                f"checkpoint.storage={self._address} needs a package that is not installed ({error}); for S3: "
                f"{install_hint('s3')}"
            ) from error
        except Exception as error:  # each kind of storage raises errors of its own
            reason = (str(error).splitlines() or [""])[0]
            raise StorageError(f"checkpoint.storage={self._address}: {type(error).__name__}: {reason}") from error


def storage_of(config: RunConfig) -> Storage | None:
    """The second place for a run's checkpoints, where its config names one."""
    place = config.checkpoint.storage
    return None if place is None else Storage(place, str(config.run.name))


def fetch(config: RunConfig, run_dir: Path) -> None:
    """Gets a run's newest and best checkpoint from the second place, where there is one and it has them.

    Raises:
        StorageError: it does not answer.
    """
    storage, root = storage_of(config), checkpoint.checkpoint_root(run_dir)
    there = [] if storage is None else storage.names()
    if storage is not None and there and storage.get(there[-1], root) is None:
        best = checkpoint.best_name(root / there[-1])
        if best in there:
            storage.get(best, root)


def fetch_best(config: RunConfig, run_dir: Path, warn: Callable[[str], None]) -> None:
    """As `fetch`, after the training; a place that is away is told to `warn` where this machine has checkpoints.

    Raises:
        UserError: it has none.
    """
    try:
        fetch(config, run_dir)
    except StorageError as error:
        if not checkpoint.checkpoints(checkpoint.checkpoint_root(run_dir)):
            raise UserError(
                f"{error}. The training is complete, its checkpoints are there; when it answers, `densenet models "
                f"register {run_dir}` registers the best one without training again."
            ) from error
        warn(f"{error}; the checkpoints on this machine are used")
