"""The files of a cache folder: shards under their own names, and in `.cache` what its processes share.

```text
train/train-000007.tar      a shard: complete, since it has this name only then
.cache/shards.json          names, sizes and hashes of all shards, and each one's first sample
.cache/lock                 locked by the process that fetches; fetcher.log is its log
.cache/clients/ID.json      what a rank needs; locked by the rank as long as it lives
.cache/clients/ID.progress  the rank's position and the shard that it waits for, int64, mapped into memory
.cache/errors/7             why shard 7 cannot be fetched
```

All locks are `flock`, which the kernel releases at the end of a process, whatever ends it; they are valid between
containers that share the folder on one node.
"""

import fcntl
import json
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.data.philox import Ints
from pipeline.data.streaming.policy import NO_SHARD, UNKNOWN
from pipeline.files import PARTIAL_PREFIX, atomic_file

_PROGRESS_BYTES = 16


def try_lock(descriptor: int) -> bool:
    """Locks an open file for this process if no other one has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True)
class CacheFolder:
    """The paths in a cache folder."""

    root: Path

    @property
    def private(self) -> Path:
        """The folder of everything but shards."""
        return self.root / ".cache"

    @property
    def lock(self) -> Path:
        """Locked by the process that fetches."""
        return self.private / "lock"

    @property
    def log(self) -> Path:
        """The log of the processes that fetched."""
        return self.private / "fetcher.log"

    @property
    def clients(self) -> Path:
        """The folder of the ranks' files."""
        return self.private / "clients"

    def error(self, shard: int) -> Path:
        """Returns the file that says why a shard cannot be fetched."""
        return self.private / "errors" / str(shard)

    def create(self) -> None:
        """Creates the folders."""
        self.clients.mkdir(parents=True, exist_ok=True)
        (self.private / "errors").mkdir(exist_ok=True)

    def partial_file(self, name: str) -> Path:
        """Returns the temporary name of a shard that is being fetched."""
        file = self.root / name
        return file.with_name(f"{PARTIAL_PREFIX}{file.name}")


@dataclass(frozen=True, eq=False)
class Shards:
    """The shards of a split: paths below the root, sizes, hashes, and the first sample of each."""

    names: Sequence[str]
    bytes_S: Ints
    sha256: list[str]
    first_rows_S1: Ints

    def save(self, folder: CacheFolder) -> None:
        """Writes `shards.json`, the same for all ranks."""
        content = {
            "names": self.names,
            "bytes": self.bytes_S.tolist(),
            "sha256": self.sha256,
            "first_rows": self.first_rows_S1.tolist(),
        }
        file = folder.private / "shards.json"
        # Containers that share the folder may have equal process ids.
        with atomic_file(file, file.with_name(f"{PARTIAL_PREFIX}{secrets.token_hex(4)}")) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")

    @staticmethod
    def load(folder: CacheFolder) -> "Shards":
        """Reads `shards.json`."""
        content = json.loads((folder.private / "shards.json").read_text(encoding="utf-8"))
        sizes_S, first_rows_S1 = (np.array(content[key], np.int64) for key in ("bytes", "first_rows"))
        return Shards(content["names"], sizes_S, content["sha256"], first_rows_S1)


@dataclass(frozen=True)
class Client:
    """What a rank needs.

    Attributes:
        source: Folder or URI of the data set.
        seed: Of its order.
        window: Shards per window of its order.
        stop: Position at which its run ends.
        limit: Bytes of the cache that it allows.
        patience_s: Seconds until a network error ends its run.
        registered_ns: When it registered.
    """

    source: str
    seed: int
    window: int
    stop: int
    limit: int
    patience_s: float
    registered_ns: int


class Registration:
    """A rank's entry in a cache folder, for as long as its process lives; `close` removes it."""

    def __init__(self, folder: CacheFolder, client: Client) -> None:
        self._file = folder.clients / f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}.json"
        self._progress_file = self._file.with_suffix(".progress")
        self._progress_file.write_bytes(np.array([UNKNOWN, NO_SHARD], np.int64).tobytes())
        with self._progress_file.open("r+b") as progress:
            self._progress = np.frombuffer(mmap.mmap(progress.fileno(), _PROGRESS_BYTES), np.int64)
        temporary = self._file.with_name(f"{PARTIAL_PREFIX}{self._file.name}")
        self._descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        is_locked = try_lock(self._descriptor)
        assert is_locked, "no other process knows this file"
        os.write(self._descriptor, json.dumps(asdict(client)).encode())
        temporary.rename(self._file)  # locked and complete from its first appearance

    def set_position(self, position: int) -> None:
        """Publishes the first position that the rank may still read."""
        self._progress[0] = position

    def set_demand(self, shard: int) -> None:
        """Publishes the shard that the rank waits for, or `NO_SHARD`."""
        self._progress[1] = shard

    def close(self) -> None:
        """Removes the entry."""
        for file in (self._file, self._progress_file):
            file.unlink(missing_ok=True)
        os.close(self._descriptor)


class ClientView:
    """Another process's registration, as the process that fetches sees it; `close` frees its descriptor."""

    def __init__(self, file: Path) -> None:
        self._file, self._progress_file = file, file.with_suffix(".progress")
        self.client = Client(**json.loads(file.read_text(encoding="utf-8")))
        with self._progress_file.open("rb") as progress:
            memory = mmap.mmap(progress.fileno(), _PROGRESS_BYTES, access=mmap.ACCESS_READ)
        self._progress = np.frombuffer(memory, np.int64)
        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def position(self) -> int:
        """The first position that the rank may still read, or `UNKNOWN`."""
        return int(self._progress[0])

    @property
    def demand(self) -> int:
        """The shard that the rank waits for, or `NO_SHARD`."""
        return int(self._progress[1])

    def is_alive(self) -> bool:
        """Whether the process lives and has not removed its registration; removes what a dead one left."""
        if not self._file.exists():
            return False
        if try_lock(self._descriptor):
            for file in (self._file, self._progress_file):
                file.unlink(missing_ok=True)
            return False
        return True

    def close(self) -> None:
        """Frees the descriptor."""
        os.close(self._descriptor)


def new_clients(folder: CacheFolder, known: set[Path]) -> Iterator[tuple[Path, ClientView]]:
    """Yields the registrations that are not in `known`."""
    for file in sorted(folder.clients.glob("[!.]*.json")):
        if file not in known:
            with suppress(FileNotFoundError):  # removed meanwhile
                yield file, ClientView(file)
