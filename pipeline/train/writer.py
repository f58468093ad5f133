"""Writes checkpoints in a thread of rank 0 while training continues (asynchronous checkpointing)."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.train import checkpoint
from pipeline.train.storage import Storage, StorageError

Keep = Callable[[list[Path]], list[Path]]  # all checkpoints, oldest first -> those to keep
_DISK_ADVICE = "Free disk space or fix the folder, and start the run again to resume it."
_DIVERGED = (
    "The training has diverged, and nothing is registered: lower optim.lr, lengthen schedule.warmup_epochs or set "
    "optim.clip_grad_norm. The earlier checkpoints are valid; the same command resumes from the latest."
)


class _NonFinite(ValueError):
    """A tensor holds NaN or infinities."""


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint's files by name: tensors for safetensors files, trees for JSON files, and texts."""

    tensors: dict[str, dict[str, torch.Tensor]]
    trees: dict[str, Any]
    texts: dict[str, str]


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread: a new checkpoint waits for the previous one.

    Use it as a context manager: its end waits for the last checkpoint, and raises a `UserError` if that could not be
    written. A checkpoint that cannot be written leaves no files and is reported to `warn`; earlier ones stay, and the
    next one is a new attempt. `on_committed` gets each committed folder and the seconds it took. With a `storage`, the
    kept checkpoints are also copied there; a failed copy is retried with the next checkpoint, and at the end.
    """

    def __init__(
        self,
        root: Path,
        on_committed: Callable[[Path, float], None],
        warn: Callable[[str], None],
        storage: Storage | None = None,
    ) -> None:
        self._root, self._on_committed, self._warn, self._storage = root, on_committed, warn, storage
        self._keep: Keep = list
        self._advice = ""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[str | None] | None = None

    def write(self, name: str, contents: CheckpointFiles, keep: Keep) -> None:
        """Starts to write the checkpoint `name`, and then removes the checkpoints that `keep` does not return."""
        self.wait()
        self._last = self._thread.submit(self._write, self._root / name, contents, keep)

    def wait(self) -> str | None:
        """Waits for the checkpoint in progress; returns why it could not be written, or None."""
        return self._last.result() if self._last is not None else None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        problem = self.wait()
        self._thread.shutdown()
        if problem is None and kind is None:
            problem, self._advice = self._copy_to_storage(), _DISK_ADVICE
        if problem is not None and kind is None:
            raise UserError(f"the run's last checkpoint {problem}. {self._advice}")

    def _write(self, folder: Path, contents: CheckpointFiles, keep: Keep) -> str | None:
        started = time.perf_counter()
        self._keep = keep
        partial = checkpoint.partial_folder(folder)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, tensors in contents.tensors.items():
                _check_finite(name, tensors)
                save_file(tensors, partial / name)
            for name, tree in contents.trees.items():
                checkpoint.write_json(partial / name, tree)
            for name, text in contents.texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            checkpoint.commit(folder)
            checkpoint.prune(self._root, keep)
        except Exception as error:  # safetensors raises an error of its own for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            problem = f"{folder} could not be written: {getattr(error, 'strerror', None) or error}"
            self._advice = _DIVERGED if isinstance(error, _NonFinite) else _DISK_ADVICE
            self._warn(f"checkpoint {problem}; training continues, and earlier checkpoints stay")
            return problem
        unstored = self._copy_to_storage()
        if unstored is not None:
            self._warn(f"checkpoint {unstored}; training continues, and the copy is retried")
        self._on_committed(folder, time.perf_counter() - started)
        return None

    def _copy_to_storage(self) -> str | None:
        """Copies new checkpoints to the storage and removes old ones; returns a problem, or None."""
        if self._storage is None:
            return None
        try:
            stored = self._storage.names()
            for folder in checkpoint.checkpoints(self._root):
                if folder.name not in stored:
                    self._storage.put(folder)
            stored = self._storage.names()
            kept = {folder.name for folder in self._keep([self._root / name for name in stored])}
            for name in stored:
                if name not in kept:
                    self._storage.remove(name)
        except StorageError as error:
            return f"copies could not be written to the storage: {error}"
        return None


def _check_finite(file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `_NonFinite` if a tensor holds NaN or infinities: such a checkpoint would only give NaN losses."""
    # NumPy, because torch would start threads that compete with training.
    non_finite = [name for name, value in tensors.items() if not np.isfinite(value.numpy()).all()]
    if non_finite:
        raise _NonFinite(f"{non_finite[0]} in {file} holds NaN or infinite values")
