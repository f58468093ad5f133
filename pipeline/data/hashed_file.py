"""A file that is written once, in order, with its size and SHA-256."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class DiskError(OSError):
    """The local disk refuses what was read from the source: it is full, or fails."""


@dataclass(frozen=True)
class Copied:
    """What was written: its number of bytes and their SHA-256."""

    bytes: int
    sha256: str


class HashedFile:
    """A new file on the local disk; use as a context manager, which flushes it to the disk at the end.

    All its methods raise `DiskError`, which tells errors of this disk from those of the source.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self.position = path, hashlib.sha256(), 0

    def __enter__(self) -> "HashedFile":
        with self._disk_errors():
            self._file = self._path.open("wb", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        with self._file, self._disk_errors():
            if kind is None:
                os.fsync(self._file.fileno())

    def write(self, block: bytes | memoryview) -> None:
        """Appends bytes."""
        self._digest.update(block)
        self.position += len(block)
        with self._disk_errors():
            rest = memoryview(block)
            while rest:
                rest = rest[self._file.write(rest) :]

    @property
    def copied(self) -> Copied:
        """What has been written so far."""
        return Copied(self.position, self._digest.hexdigest())

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(error.errno, error.strerror, str(self._path)) from error
