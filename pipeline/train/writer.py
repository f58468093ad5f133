"""Writes checkpoints in a thread of rank 0 while training goes on."""

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

Keep = Callable[[list[Path]], list[Path]]  # of all checkpoints, oldest first
_ROOM = "Make room or fix the folder, and start again."
_DIVERGED = (
    "The training has diverged, and nothing is registered: lower optim.lr, lengthen schedule.warmup_epochs or set "
    "optim.clip_grad_norm. The checkpoints before it are valid; the same command goes on from the newest."
)


class _NonFinite(ValueError):
    """A tensor holds NaN or infinities."""


@dataclass(frozen=True)
class Contents:
    """A checkpoint's files by name: tensors as safetensors, trees as JSON, texts as they are."""

    tensors: dict[str, dict[str, torch.Tensor]]
    trees: dict[str, Any]
    texts: dict[str, str]


class Writer:
    """One checkpoint at a time: a new one waits for the one before.

    Use it as a context manager: the end waits for the last one, and is a `UserError` where that could not be written.
    One that cannot be written leaves nothing behind and is told to `warn`; the ones before it stay, and the next one is
    another try. `written` is told each committed folder and the seconds that it took. With a `storage`, those that are
    kept are kept there too; what it did not take is copied with the next one, or at the end.
    """

    def __init__(
        self,
        root: Path,
        written: Callable[[Path, float], None],
        warn: Callable[[str], None],
        storage: Storage | None = None,
    ) -> None:
        self._root, self._written, self._warn, self._storage = root, written, warn, storage
        self._keep: Keep = list
        self._advice = ""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[str | None] | None = None

    def write(self, name: str, contents: Contents, keep: Keep) -> None:
        """Begins to write the checkpoint `name`; afterwards those that `keep` does not choose are removed."""
        self.wait()
        self._last = self._thread.submit(self._write, self._root / name, contents, keep)

    def wait(self) -> str | None:
        """Waits for the checkpoint under way; says why it could not be written, or None."""
        return self._last.result() if self._last is not None else None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        problem = self.wait()
        self._thread.shutdown()
        if problem is None and kind is None:
            problem, self._advice = self._store(), _ROOM
        if problem is not None and kind is None:
            raise UserError(f"the run's last checkpoint {problem}. {self._advice}")

    def _write(self, folder: Path, contents: Contents, keep: Keep) -> str | None:
        started = time.perf_counter()
        self._keep = keep
        partial = checkpoint.partial(folder)
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
        except Exception as error:  # safetensors tells of a full disk by an error of its own
            shutil.rmtree(partial, ignore_errors=True)
            problem = f"{folder} could not be written: {getattr(error, 'strerror', None) or error}"
            self._advice = _DIVERGED if isinstance(error, _NonFinite) else _ROOM
            self._warn(f"checkpoint {problem}; training goes on, and the checkpoints before it stay")
            return problem
        unstored = self._store()
        if unstored is not None:
            self._warn(f"checkpoint {unstored}; training goes on, and it is tried again")
        self._written(folder, time.perf_counter() - started)
        return None

    def _store(self) -> str | None:
        """Copies what the storage lacks, and removes what is not to be kept; says what could not be copied."""
        if self._storage is None:
            return None
        try:
            there = self._storage.names()
            for folder in checkpoint.checkpoints(self._root):
                if folder.name not in there:
                    self._storage.put(folder)
            there = self._storage.names()
            kept = {folder.name for folder in self._keep([self._root / name for name in there])}
            for name in there:
                if name not in kept:
                    self._storage.remove(name)
        except StorageError as error:
            return f"copies could not be brought up to date: {error}"
        return None


def _check_finite(file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `_NonFinite` where a value is no number: a gradient was none, and the next loss will be none."""
    # Not by torch, whose threads in this one would compete with those that train.
    wrong = [name for name, value in tensors.items() if not np.isfinite(value.numpy()).all()]
    if wrong:
        raise _NonFinite(f"{wrong[0]} in {file} holds values that are no numbers")
