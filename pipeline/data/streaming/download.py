"""Fetches one shard to the cache, and tries again after errors of the network."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from pipeline.data.hashed_file import DiskError
from pipeline.data.parquet_images import parquet_name
from pipeline.data.sources import copy_shard, describe, is_refused
from pipeline.errors import DataError
from pipeline.files import atomic_file

Result = TypeVar("Result")

_FIRST_DELAY_S, _MAX_DELAY_S = 0.2, 30.0
_CHECKSUM_TRIES = 3


class Stopped(Exception):
    """The process that fetches ends."""


class FetchError(Exception):
    """A shard cannot be fetched; the message says why, and what to do."""


class Download:
    """Fetches shards of one source; the methods may run in several threads.

    `stop` ends running and future fetches, with `Stopped`; `log` receives what failed.
    """

    def __init__(self, source: str, stop: threading.Event, log: Callable[[str], None]) -> None:
        self._source, self._stop, self._log = source, stop, log

    def fetch(self, name: str, size: int, sha256: str, target: Path, temporary: Path, patience_s: float) -> None:
        """Fetches a shard, and renames it to its final name when its size and SHA-256 are correct.

        Tries again after errors that may pass, for `patience_s` seconds.

        Raises:
            FetchError: the shard is missing, refused, corrupt, or the network did not recover.
            DiskError: it cannot be written.
            Stopped: `stop` is set.
        """

        def attempt(files: Any, root: str) -> None:
            with atomic_file(target, temporary):
                self._copy(files, root, name, size, sha256, temporary)

        self.retry(name, attempt, patience_s)

    def retry(self, name: str, function: Callable[[Any, str], Result], patience_s: float) -> Result:
        """Returns the result of `function`, which gets the fsspec file system and the source's path in it.

        Calls it again after errors that may pass, for `patience_s` seconds; `name` is that of the shard in errors.

        Raises:
            FetchError: the shard is missing, refused, corrupt, or the network did not recover.
            DataError, DiskError, Stopped: as raised by `function`.
        """
        started, mismatches, attempt = time.monotonic(), 0, 0
        while True:
            try:
                self._check_stop()
                return function(*self._file_system(name))
            except (FetchError, DataError, DiskError, Stopped):
                raise
            except _Mismatch as error:
                mismatches += 1
                reason = str(error)
                if mismatches == _CHECKSUM_TRIES:
                    raise self._error(
                        name,
                        f"{reason} in {mismatches} tries",
                        "run `densenet data verify` on the source, or index it again if it has changed",
                    ) from error
            except Exception as error:  # each fsspec file system raises its own errors
                reason = describe(error)
                self._raise_if_permanent(name, error, reason)
            attempt += 1
            waited_s = time.monotonic() - started
            if waited_s > patience_s:
                raise self._error(
                    name,
                    f"{attempt} tries in {waited_s:.0f} s failed, the last one with {reason}",
                    "check the network and the store, and start the run again, which resumes",
                )
            delay_s = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0**attempt) * random.uniform(0.5, 1)
            self._log(f"try {attempt} of {name} failed ({reason}); the next one is in {delay_s:.1f} s")
            self._stop.wait(delay_s)

    def _copy(self, files: Any, root: str, name: str, size: int, sha256: str, temporary: Path) -> None:
        try:
            copied = copy_shard(files, root, name, temporary, self._check_stop)
        except DataError as error:
            raise _Mismatch(f"it cannot be unpacked ({str(error).rstrip('.')})") from error
        if copied.bytes != size:
            if parquet_name(name) is not None:
                raise _Mismatch(f"its images have {copied.bytes:,} bytes, the index has {size:,}")
            stored = files.size(f"{root}/{name}")
            if stored not in (None, size):
                raise self._error(
                    name, f"it has {stored:,} bytes, the index has {size:,}", "copy the data set there again"
                )
            raise OSError(f"{copied.bytes:,} of {size:,} bytes were received")
        if copied.sha256 != sha256:
            raise _Mismatch("its SHA-256 differs from the index")

    def _file_system(self, name: str) -> tuple[Any, str]:
        try:
            return fsspec.core.url_to_fs(self._source)
        except (ImportError, ValueError) as error:
            raise self._error(name, describe(error), "install what this URI needs, or correct it") from error

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _raise_if_permanent(self, name: str, error: Exception, reason: str) -> None:
        """Raises `FetchError` for errors that another try cannot change."""
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            raise self._error(name, "it does not exist", "copy the data set there again") from error
        if is_refused(error):
            raise self._error(
                name, reason, "set the credentials in the environment, and check what they permit"
            ) from error

    def _error(self, name: str, reason: str, advice: str) -> FetchError:
        return FetchError(f"shard {name} of {self._source} cannot be fetched: {reason}. To continue, {advice}.")


class _Mismatch(Exception):
    """A shard that was received completely is another one than the indexed."""
