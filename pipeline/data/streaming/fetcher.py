"""The process that fetches and evicts shards for all ranks on a node: `python -m pipeline.data.streaming.fetcher`.

A rank starts it (`ShardCache`). It ends a few seconds after the last rank.
"""

import errno
import logging
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from logging.handlers import RotatingFileHandler
from pathlib import Path

import numpy as np

from pipeline.data.hashed_file import DiskError
from pipeline.data.order import WindowedOrder
from pipeline.data.sources import PARALLEL_COPIES
from pipeline.data.space import free_bytes
from pipeline.data.streaming.download import Download, FetchError, Stopped
from pipeline.data.streaming.folder import CacheFolder, ClientView, Shards, new_clients
from pipeline.data.streaming.policy import NO_SHARD, Need, Priorities, plan_actions, prioritize
from pipeline.files import write_text
from pipeline.formatting import format_bytes

_POLL_S = 0.1
_LINGER_S = 5.0  # after the last rank
_POSTPONE_S = 10.0  # of a shard that could not be fetched
_FULL_DISK_S = 600.0  # until the limit is tried again after the disk was full
_LOG_BYTES = 16 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger("fetcher")


class Fetcher:
    """Fetches and evicts shards in a cache folder until no rank needs it, or `stop` is set."""

    def __init__(self, folder: CacheFolder, stop: threading.Event) -> None:
        self._folder, self._stop = folder, stop
        self._shards = Shards.load(folder)
        self._bytes_S = self._shards.bytes_S
        count = len(self._bytes_S)
        self._present_S, self._fetching_S = np.zeros(count, bool), np.zeros(count, bool)
        self._postponed_until_S = np.zeros(count)
        self._space, self._space_until = np.inf, 0.0  # bytes that fit when the disk was full
        self._clients: dict[Path, ClientView] = {}
        self._state: list[tuple[Path, int, int]] | None = None
        self._orders: dict[tuple[int, int], WindowedOrder] = {}
        self._downloads: dict[str, Download] = {}
        self._futures: dict[Future[None], int] = {}
        self._done = threading.Event()
        self._scan()

    def run(self) -> None:
        """Serves the ranks."""
        idle_since: float | None = None
        pool = ThreadPoolExecutor(PARALLEL_COPIES, "fetch")
        try:
            while not self._stop.is_set():
                self._update_clients()
                self._collect()
                self._check_demands()
                now = time.monotonic()
                if self._clients:
                    idle_since = None
                    self._act(pool, now)
                elif idle_since is None:
                    idle_since = now
                elif now - idle_since > _LINGER_S:
                    return
                self._done.wait(_POLL_S)
                self._done.clear()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _scan(self) -> None:
        """Takes over the shards on disk, and removes what a killed process left."""
        for file in self._folder.error(0).parent.iterdir():
            file.unlink()
        for number, name in enumerate(self._shards.names):
            file = self._folder.root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            self._folder.partial_file(name).unlink(missing_ok=True)
            self._present_S[number] = self._is_on_disk(number)
            if not self._present_S[number]:
                file.unlink(missing_ok=True)
        log.info("started with %d of %d shards on disk", self._present_S.sum(), len(self._bytes_S))

    def _update_clients(self) -> None:
        for file, view in list(self._clients.items()):
            if not view.is_alive():
                view.close()
                del self._clients[file]
                log.info("%s has ended", file.stem)
        for file, view in new_clients(self._folder, set(self._clients)):
            self._clients[file] = view
            log.info("%s needs %s", file.stem, view.client)
        self._clients = dict(sorted(self._clients.items(), key=lambda item: item[1].client.registered_ns))

    def _collect(self) -> None:
        """Takes the results of finished downloads."""
        for future in [future for future in self._futures if future.done()]:
            number = self._futures.pop(future)
            self._fetching_S[number] = False
            try:
                future.result()
            except Stopped:
                continue
            except FetchError as error:
                self._fail(number, str(error))
            except DiskError as error:
                if error.errno in _FULL:
                    self._shrink(number)
                else:
                    self._fail(number, f"data.stage: {error.filename}: {error.strerror}.")
            except Exception as error:  # a rank that waits must get any error
                log.exception("error")
                self._fail(number, f"shard {self._shards.names[number]} cannot be fetched: {error!r}.")
            else:
                self._present_S[number] = True
                self._folder.error(number).unlink(missing_ok=True)
                log.info("fetched %s, %s", self._shards.names[number], self._usage())

    def _check_demands(self) -> None:
        """Fetches shards again that somebody else has removed from the disk."""
        for view in self._clients.values():
            number = view.demand
            if number != NO_SHARD and self._present_S[number] and not self._is_on_disk(number):
                self._present_S[number] = False
                log.warning("%s is not on disk any more", self._shards.names[number])

    def _is_on_disk(self, number: int) -> bool:
        file = self._folder.root / self._shards.names[number]
        return file.is_file() and file.stat().st_size == self._bytes_S[number]

    def _act(self, pool: ThreadPoolExecutor, now: float) -> None:
        """Evicts and starts downloads."""
        priorities, clients = self._prioritize(), [view.client for view in self._clients.values()]
        if now > self._space_until:
            self._space = np.inf
        limit = int(min(self._space, max(client.limit for client in clients)))
        is_postponed_S = self._postponed_until_S > now
        slots = PARALLEL_COPIES - len(self._futures)
        present_S, fetching_S = self._present_S, self._fetching_S
        actions = plan_actions(priorities, self._bytes_S, present_S, fetching_S, is_postponed_S, limit, slots)
        for number in actions.evict:
            (self._folder.root / self._shards.names[number]).unlink(missing_ok=True)
            self._present_S[number] = False
            log.info("evicted %s, %s", self._shards.names[number], self._usage())
        patience_s = min(client.patience_s for client in clients)
        for number in actions.fetch:
            self._start(pool, number, clients[0].source, patience_s)
        if self._space < np.inf and not actions.fetch and not self._futures:
            self._fail_without_space(priorities)

    def _prioritize(self) -> Priorities:
        """Orders the shards by need; again only when a rank has entered another window or waits for another shard."""
        needs = [self._need(view) for view in self._clients.values()]
        state = [(file, need.window, need.demand) for file, need in zip(self._clients, needs, strict=True)]
        if state != self._state:
            self._state, self._priorities = state, prioritize(needs, len(self._bytes_S))
        return self._priorities

    def _need(self, view: ClientView) -> Need:
        key = view.client.seed, view.client.window
        if key not in self._orders:
            self._orders[key] = WindowedOrder(key[0], self._shards.first_rows_S1, key[1])
        return Need(self._orders[key], view.position, view.client.stop, view.demand)

    def _start(self, pool: ThreadPoolExecutor, number: int, source: str, patience_s: float) -> None:
        name = self._shards.names[number]
        if source not in self._downloads:
            self._downloads[source] = Download(source, self._stop, log.warning)
        self._fetching_S[number] = True
        future = pool.submit(
            self._downloads[source].fetch,
            name,
            int(self._bytes_S[number]),
            self._shards.sha256[number],
            self._folder.root / name,
            self._folder.partial_file(name),
            patience_s,
        )
        self._futures[future] = number
        future.add_done_callback(lambda _: self._done.set())

    def _fail(self, number: int, message: str) -> None:
        """Reports a shard's error to the ranks that wait for it, and tries it again later."""
        log.error(message)
        write_text(self._folder.error(number), message)
        self._postponed_until_S[number] = time.monotonic() + _POSTPONE_S

    def _shrink(self, number: int) -> None:
        """Lowers the limit for a while to what fits on the full disk."""
        self._space = float(self._bytes_S[self._present_S | self._fetching_S].sum())
        self._space_until = time.monotonic() + _FULL_DISK_S
        log.warning("the disk is full at %s, without %s", self._usage(), self._shards.names[number])

    def _fail_without_space(self, priorities: Priorities) -> None:
        """Reports the shards that are read now, and do not fit on the full disk."""
        now_S = (priorities.uses_S == 0) & ~self._present_S
        for number in np.flatnonzero(now_S & (self._postponed_until_S < time.monotonic())).tolist():
            self._fail(
                number,
                f"data.stage: {self._folder.root} is full before data.stage_limit is reached: "
                f"{format_bytes(free_bytes(self._folder.root))} are free, and the shards that are read now need "
                f"{format_bytes(self._bytes_S[now_S].sum())} more. Free disk space, or use a smaller data.window.",
            )

    def _usage(self) -> str:
        bytes_on_disk, in_progress = (int(self._bytes_S[of_S].sum()) for of_S in (self._present_S, self._fetching_S))
        return f"{bytes_on_disk} bytes on disk and {in_progress} in progress"


def main(root: Path) -> None:
    """Runs until no rank needs the folder, or SIGTERM."""
    folder, stop = CacheFolder(root), threading.Event()
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(process)d %(levelname)s %(message)s",
        handlers=[RotatingFileHandler(folder.log, maxBytes=_LOG_BYTES, backupCount=1)],
    )
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        Fetcher(folder, stop).run()
    except Exception:  # raised again; the log is all that a waiting rank can show of this detached process
        log.exception("the process ends")
        raise
    log.info("ended")


if __name__ == "__main__":
    main(Path(sys.argv[1]))  # it has inherited the locked file, which stays open
