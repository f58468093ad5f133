"""Reads the files of a data set in a folder or at a URI: copies with a checksum, and errors that name the URI."""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.extras import install_hint

PARALLEL_COPIES = 8  # shards at once: object stores limit the bandwidth of a single stream
_BLOCK = 8 << 20


class DiskError(OSError):
    """The local disk refuses what was read from the source: it is full, or fails."""


@dataclass(frozen=True)
class Copied:
    """What a copy contains: its number of bytes and their SHA-256."""

    bytes: int
    sha256: str


def copy_file(files: Any, source: str, target: Path, on_block: Callable[[], None] = lambda: None) -> Copied:
    """Copies a file of an fsspec file system to the local disk and flushes it; calls `on_block` with each block.

    Raises:
        DiskError: the copy cannot be written.
        Exception: the source cannot be read; each fsspec file system raises its own errors.
    """
    digest, count = hashlib.sha256(), 0
    with files.open(source, "rb") as stream, _create(target) as out:
        while block := stream.read(_BLOCK):
            on_block()
            digest.update(block)
            count += len(block)
            with _disk_errors(target):
                rest = memoryview(block)
                while rest:
                    rest = rest[out.write(rest) :]
        with _disk_errors(target):
            os.fsync(out.fileno())
    return Copied(count, digest.hexdigest())


def _create(target: Path) -> io.FileIO:
    with _disk_errors(target):
        return target.open("wb", buffering=0)


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(error.errno, error.strerror, str(target)) from error


@contextlib.contextmanager
def errors_name_uri(uri: str) -> Iterator[None]:
    """Converts errors of file systems into a `DataError` that names the URI; errors of the local disk pass."""
    try:
        yield
    except (DataError, DiskError):
        raise
    except ImportError as error:
        raise DataError(
            f"{uri} needs a package that is not installed ({error}); for S3: {install_hint('s3')}"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{uri}: {error} does not exist. Use a data set from `densenet data prepare`.") from error
    except Exception as error:  # each fsspec file system raises its own errors
        raise DataError(f"{uri} cannot be read: {describe(error)}") from error


def describe(error: Exception) -> str:
    """Returns an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
