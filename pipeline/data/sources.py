"""Reads the files of a data set in a folder or at a URI: copies with a checksum, and errors that name the URI."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data.hashed_file import Copied, DiskError, HashedFile
from pipeline.data.parquet_images import copy_images, parquet_name
from pipeline.errors import DataError
from pipeline.extras import install_hint

PARALLEL_COPIES = 8  # shards at once: object stores limit the bandwidth of a single stream
_BLOCK = 8 << 20
_REFUSED = (  # the first words of the stores' errors
    "NoCredentials",
    "PartialCredentials",
    "CredentialRetrieval",
    "DefaultCredentials",
    "Refresh",
    "Authentication",
)


def copy_shard(files: Any, root: str, name: str, target: Path, on_block: Callable[[], None] = lambda: None) -> Copied:
    """Copies a shard below `root` to the local disk, or unpacks the Parquet file that contains its images.

    Args:
        files: fsspec file system.
        root: Path of the data set in it.
        name: The shard's name in the index.
        target: New file.
        on_block: Called with each block; what it raises ends the copy.

    Raises:
        DataError: a Parquet file is corrupt, or has no images.
        DiskError: the copy cannot be written.
        Exception: the source cannot be read; each fsspec file system raises its own errors.
    """
    parquet = parquet_name(name)
    if parquet is not None:
        return copy_images(files, f"{root}/{parquet}", target, on_block)
    return copy_file(files, f"{root}/{name}", target, on_block)


def copy_file(files: Any, source: str, target: Path, on_block: Callable[[], None] = lambda: None) -> Copied:
    """Copies a file byte for byte, as `copy_shard`."""
    with files.open(source, "rb") as stream, HashedFile(target) as out:
        while block := stream.read(_BLOCK):
            on_block()
            out.write(block)
        return out.copied


def is_refused(error: Exception) -> bool:
    """Whether credentials are missing or do not suffice."""
    return isinstance(error, PermissionError) or type(error).__name__.startswith(_REFUSED)


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
        raise DataError(f"{uri}: {error} does not exist: correct the address.") from error
    except Exception as error:  # each fsspec file system raises its own errors
        advice = " Set the credentials in the environment, and check what they permit." if is_refused(error) else ""
        raise DataError(f"{uri} cannot be read: {describe(error)}.{advice}") from error


def describe(error: Exception) -> str:
    """Returns an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
