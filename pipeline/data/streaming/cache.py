"""A rank's side of the cache: says what it will read, waits for shards, and opens them."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.config_data import Data
from pipeline.data.files import File
from pipeline.data.index import DatasetIndex
from pipeline.data.order import WindowedOrder
from pipeline.data.plan import PlannedBatch
from pipeline.data.space import free_bytes
from pipeline.data.streaming.folder import CacheFolder, Client, Registration, Shards, try_lock
from pipeline.data.streaming.policy import NO_SHARD
from pipeline.errors import DataError
from pipeline.formatting import format_bytes

_POLL_S = 0.02
_CHECK_FETCHER_S = 0.5
_MAX_PATIENCE_S = 600.0
_MAX_WAIT = 2.5  # times the patience: the end of a wait for which no error was reported
_MAX_STARTS = 5  # of the process that fetches, while one shard is awaited
_LOG_LINES = 5

# The intermediate process ends at once, so that the one that fetches is nobody's child: it serves all ranks, and some
# launchers kill the children of a rank that ends.
_DETACH = "import os, sys\nif os.fork() == 0:\n    os.execv(sys.argv[1], sys.argv[1:])"


def open_cache(
    data: Data, seed: int, index: DatasetIndex, val: int, *, stop: int, hang_timeout_s: float | None = None
) -> "ShardCache":
    """Creates a rank's cache of the training split of a config that streams it (`Data.streams`).

    `val` is the size of the shards for evaluation, bytes: they count as part of `data.stage_limit`.
    """
    assert data.stage_limit_bytes is not None
    return ShardCache(
        index,
        WindowedOrder(seed, index.first_rows_S1, data.window),
        index.address or str(data.root),
        Path(str(data.stage)),
        stop=stop,
        limit=data.stage_limit_bytes - val,
        hang_timeout_s=hang_timeout_s,
    )


class ShardCache:
    """The shards of a split for one rank, in a folder that all ranks on the node share.

    `open` waits until a shard is there. Call `close` at the end; it also ends the waits of other threads.

    Args:
        index: The split's index.
        order: The order in which the rank's run reads the shards.
        source: Folder or URI of the data set.
        base: Folder on the node's local disk, below which the cache is.
        stop: Position at which the run ends.
        limit: Bytes of the shards on disk.
        hang_timeout_s: Errors of the network end the wait for a shard in less than this time.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(
        self,
        index: DatasetIndex,
        order: WindowedOrder,
        source: str,
        base: Path,
        *,
        stop: int,
        limit: int,
        hang_timeout_s: float | None = None,
    ) -> None:
        self._order, self._stop, self._base, self._num_samples = order, stop, base, len(index)
        self._folder = CacheFolder(base / f"{index.fingerprint[:16]}-stream")
        shards = [index.shards[name] for name in index.files]
        self._shards = Shards(
            index.files,
            np.array([shard.bytes for shard in shards], np.int64),
            [shard.sha256 for shard in shards],
            order.first_rows_S1,
        )
        self._numbers = {self._folder.root / name: number for number, name in enumerate(index.files)}
        self._patience_s = min(_MAX_PATIENCE_S, (hang_timeout_s or np.inf) / 3)
        self._kept: frozenset[int] = frozenset()
        self._window: tuple[int, int] | None = None
        self._open_files: dict[int, File] = {}
        self._error: str | None = None
        self._failed = 0.0  # when it was raised, s
        self._demand_lock, self._closed = threading.Lock(), threading.Event()
        client = Client(source, order.seed, order.window, stop, limit, self._patience_s, time.time_ns())
        try:
            self._folder.create()
            self._shards.save(self._folder)
            self._registration = Registration(self._folder, client)
            self._start_fetcher()
        except OSError as error:
            raise DataError(f"data.stage={base}: {error.filename or ''} {error.strerror or error}.") from error

    def __enter__(self) -> "ShardCache":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all waits, and removes the registration."""
        if not self._closed.is_set():
            self._closed.set()
            self._registration.close()
            self._open_files.clear()

    def readable(self, index: DatasetIndex) -> DatasetIndex:
        """Returns an index that reads its shards from this cache."""
        return index.with_root(self._folder.root, self)

    def follow(self, batches: Iterator[PlannedBatch]) -> Iterator[PlannedBatch]:
        """Yields the batches of the rank, in order, and publishes their positions.

        The caller must read a batch before it requests the next one.
        """
        for batch in batches:
            self._advance(int(batch.positions_B[0]))
            yield batch
        self._advance(self._stop)

    def open(self, path: Path) -> File:
        """Opens a shard; waits until it is there.

        Raises:
            DataError: it cannot be fetched.
        """
        number = self._numbers[path]
        file = self._open_files.get(number)
        if file is None:
            file = self._open_existing(path, number) or self._wait(path, number)
            if number in self._kept:
                self._open_files[number] = file
        return file

    def _open_existing(self, path: Path, number: int) -> File | None:
        """Opens a shard if it is there; one of another size is not: the process that fetches will remove it."""
        try:
            return File(path) if path.stat().st_size == self._shards.bytes_S[number] else None
        except FileNotFoundError:
            return None

    def _advance(self, position: int) -> None:
        """Publishes the first position that is still to be read; first closes the shards of earlier windows.

        An evicted shard that is open still occupies the disk.
        """
        epoch, offset = divmod(position, self._num_samples)
        windows = self._order.windows(epoch)
        window = self._order.window_of(epoch, offset)
        if self._window != (epoch, window):
            self._window, self._kept = (epoch, window), frozenset(windows.shards(window).tolist())
            opened = list(self._open_files.items())  # at once: other threads may open shards
            self._open_files = {number: file for number, file in opened if number in self._kept}
        if not self._closed.is_set():
            self._registration.set_position(position)

    def _wait(self, path: Path, number: int) -> File:
        """Waits for one shard at a time: the process that fetches gives it priority."""
        requested = time.monotonic()
        with self._demand_lock:
            if self._error is not None and self._failed > requested:
                raise DataError(self._error)  # at once: the threads of a batch would fail one after the other
            started, started_ns, starts, checked = time.monotonic(), time.time_ns(), 0, -np.inf
            try:
                while (file := self._open_existing(path, number)) is None:
                    if self._closed.is_set():
                        raise RuntimeError("this cache is closed")
                    self._registration.set_demand(number)
                    self._raise_error(number, started_ns)
                    now = time.monotonic()
                    if now - checked > _CHECK_FETCHER_S:
                        checked = now
                        starts += self._start_fetcher()
                        self._raise_if_hopeless(number, now - started, starts)
                    self._closed.wait(_POLL_S)
                return file
            except DataError as error:
                self._error, self._failed = str(error), time.monotonic()
                raise
            finally:
                if not self._closed.is_set():
                    self._registration.set_demand(NO_SHARD)

    def _raise_error(self, number: int, since_ns: int) -> None:
        """Raises what the process that fetches says about a shard since this rank waits for it."""
        file = self._folder.error(number)
        try:
            if file.stat().st_mtime_ns >= since_ns:
                raise DataError(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass

    def _raise_if_hopeless(self, number: int, waited_s: float, starts: int) -> None:
        if starts <= _MAX_STARTS and waited_s < _MAX_WAIT * self._patience_s:
            return
        log = self._folder.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        raise DataError(
            f"shard {self._shards.names[number]} did not come to data.stage={self._base} within {waited_s:.0f} s, and "
            f"the process that fetches was started {starts} times; {format_bytes(free_bytes(self._base))} are free. "
            f"Several runs on a node need a data.stage_limit for "
            f"the windows of all of them, or another data.stage. The end of {self._folder.log}:\n  " + "\n  ".join(log)
        )

    def _start_fetcher(self) -> bool:
        """Starts the process that fetches, unless one is running on this node; returns whether it did.

        The process inherits the locked file, so there is never a second one. It inherits the environment too, which
        has the credentials.
        """
        descriptor = os.open(self._folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not try_lock(descriptor):
                return False
            # -P: not from the working folder, which may have other modules of these names
            command = [sys.executable, "-P", "-m", "pipeline.data.streaming.fetcher", str(self._folder.root)]
            project = str(Path(__file__).resolve().parents[3])
            paths = os.pathsep.join(filter(None, [project, os.environ.get("PYTHONPATH")]))
            with self._folder.log.open("ab") as log:
                subprocess.run(
                    [sys.executable, "-I", "-S", "-c", _DETACH, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"PYTHONPATH": paths},
                    pass_fds=[descriptor],
                    start_new_session=True,
                    check=True,
                )
        finally:
            os.close(descriptor)
        return True
