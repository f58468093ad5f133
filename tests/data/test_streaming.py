"""Streaming: ranks read shards from an unreliable S3 store through a cache of a third of the data, as from a folder."""

import contextlib
import fcntl
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

import pipeline
from pipeline.data.dataset import open_splits
from pipeline.data.order import WindowedOrder
from pipeline.data.plan import PlannedBatch
from pipeline.data.streaming.cache import ShardCache
from pipeline.data.streaming.folder import CacheFolder
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.errors import DataError, UserError
from tests.conftest import PROJECT
from tests.data.conftest import write_image
from tests.servers import PATIENCE_S, UnreliableDownloads, s3_store

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning"
)  # of the store's client and server

TRAIN, BATCH, WINDOW = 120, 6, 2
CONFIG = {"data": {"shuffle": "windowed", "window": WINDOW, "image_size": 32, "on_corrupt": "skip"}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 20 or so small shards; the pixels of one sample cannot be decoded."""
    folder = tmp_path_factory.mktemp("streaming")
    for split, count in (("train", TRAIN), ("val", 12)):
        for i in range(count):
            write_image(folder / "source" / split / "abc"[i % 3] / f"{i:03d}.JPEG", i, 48 + i % 9, 40 + i % 7)
    rotten = folder / "source" / "train" / "b" / "040.JPEG"
    content = bytearray(rotten.read_bytes())
    table = content.index(b"\xff\xc4")
    content[table + 5 : table + 21] = b"\xff" * 16  # an impossible Huffman table: only decoding finds it
    rotten.write_bytes(content)
    with Pool(1) as pool:
        prepare(folder / "source", folder / "set", PrepareOptions(shard_bytes=10_000), pool)
    return folder / "set"


@pytest.fixture
def downloads(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UnreliableDownloads]:
    """The data set in a bucket, as s3://bucket/set."""
    layer = UnreliableDownloads()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_store(monkeypatch, layer):
        fsspec.filesystem("s3").put(f"{shards}/", "bucket/set/", recursive=True)
        yield layer


def split_bytes(shards: Path) -> dict[str, list[int]]:
    splits = open_splits(str(shards), "train", "val", shards)
    return {
        name: [shard.bytes for shard in index.shards.values()]
        for name, index in zip(("train", "val"), splits, strict=True)
    }


@pytest.fixture
def limit(shards: Path) -> int:
    """A third of the training split, and the evaluation split."""
    sizes = split_bytes(shards)
    return sum(sizes["train"]) // 3 + sum(sizes["val"])


Images = list[tuple[list[int], torch.Tensor]]


def read(root: object, folder: Path, limit: int | None = None, **arguments: Any) -> tuple[Images, list[int]]:
    """Reads training batches; returns each one's samples and pixels, and the skipped samples."""
    stage = folder if limit is not None or "://" in str(root) else None
    data = pipeline.open_dataset(str(root), stage=stage, stage_limit=limit, cache=folder / "indexes")
    batches = data.batches("train", BATCH, config=pipeline.load_config(CONFIG), **arguments)
    found = [(batch.ids_N.tolist(), batch.images_NCHW) for batch in batches]
    return found, sorted(batches.skipped)


def same(one: Images, two: Images) -> bool:
    pairs = list(zip(one, two, strict=True))
    return all(ids == others and torch.equal(a, b) for (ids, a), (others, b) in pairs)


def _rank(environment: dict[str, str], out: Path, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    torch.save(read(*arguments, **options), out)


class Ranks:
    """Processes that each read their rank's batches."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, dict[Path, BaseProcess]()

    def start(self, *arguments: Any, **options: Any) -> BaseProcess:
        out = self.folder / f"rank{len(self.processes)}.pt"
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_rank, args=(dict(os.environ), out, arguments, options))
        process.start()
        self.processes[out] = process
        return process

    def results(self) -> list[tuple[Images, list[int]]]:
        for process in self.processes.values():
            process.join()
        assert [process.exitcode for process in self.processes.values()] == [0] * len(self.processes)
        return [torch.load(out, weights_only=False) for out in self.processes]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(tmp_path)
    yield started
    for process in started.processes.values():
        if process.is_alive():
            process.kill()
            process.join()


def cache_folder(stage: Path) -> CacheFolder:
    (root,) = stage.glob("*-stream")
    return CacheFolder(root)


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (result := condition()):
        assert time.monotonic() < deadline
        os.sched_yield()
    return result


def is_locked(file: Path) -> bool:
    with file.open("r+b") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def fetched(stage: Path) -> list[str]:
    """Returns the shards that were fetched, in order, from the log."""
    return re.findall(r"INFO fetched (\S+),", cache_folder(stage).log.read_text())


def check_usage(stage: Path, limit: int) -> None:
    """Checks the bytes of complete and partial shards, which the log has for each change."""
    log = cache_folder(stage).log.read_text()
    usages = [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes on disk and (\d+) in progress", log)]
    assert usages
    assert max(usages) <= limit
    assert not list(cache_folder(stage).root.rglob(".partial-*"))


@pytest.mark.slow
def test_ranks_of_two_runs_read_the_same_as_from_a_folder(shards, downloads, limit, ranks, tmp_path):
    """With latency, failed requests, broken connections and truncated shards, over two epochs."""
    downloads.delay_s = 0.02
    errors = {1: "500", 2: "reset", 3: "truncated"}
    downloads.error_of = lambda name, request: errors.get(request) if int(name[-5]) % 2 else None
    stage, size = tmp_path / "fast", limit + 4 * max(split_bytes(shards)["train"])
    for seed in (0, 7):
        for rank in range(2):
            ranks.start("s3://bucket/set", stage, size, seed=seed, epochs=2, rank=rank, world_size=2)
    results = ranks.results()
    expected = [
        read(shards, tmp_path, seed=seed, epochs=2, rank=rank, world_size=2) for seed in (0, 7) for rank in range(2)
    ]
    for (images, skipped), (expected_images, expected_skipped) in zip(results, expected, strict=True):
        assert same(images, expected_images)
        assert skipped == expected_skipped
    assert any(skipped for _, skipped in results), "the sample that cannot be decoded was replaced"
    check_usage(stage, size - sum(split_bytes(shards)["val"]))
    assert "try 1 of train/" in cache_folder(stage).log.read_text()


def test_a_run_resumes_in_an_epoch_and_fetches_only_the_shards_of_its_windows(shards, downloads, limit, tmp_path):
    index, _ = open_splits(str(shards), "train", "val", tmp_path)
    windows = WindowedOrder(3, index.first_rows_S1, WINDOW).windows(1)
    start, stop = (TRAIN + int(windows.first_offsets_W1[w]) for w in (2, 5))
    start, stop = start + 2, stop - (stop - start - 2) % BATCH
    images, _ = read("s3://bucket/set", tmp_path / "fast", limit, seed=3, start=start, stop=stop)
    assert same(images, read(shards, tmp_path, seed=3, start=start, stop=stop)[0])
    needed = {index.files[shard] for w in (2, 3, 4) for shard in windows.shards(w)}
    assert set(fetched(tmp_path / "fast")) == needed
    check_usage(tmp_path / "fast", limit)


def test_what_is_on_disk_is_used_by_the_next_run(shards, downloads, tmp_path):
    """A limit of all data: an epoch is fetched once; a shard of another size and a partial one are replaced."""
    stage, everything = tmp_path / "fast", sum(map(sum, split_bytes(shards).values()))
    read("s3://bucket/set", stage, everything, seed=1)
    count = len(split_bytes(shards)["train"])
    assert len(fetched(stage)) == count
    folder = cache_folder(stage)
    wait_for(lambda: not is_locked(folder.lock))
    first, second, *_ = sorted((folder.root / "train").iterdir())
    first.write_bytes(b"short")
    second.with_name(f".partial-{second.name}").write_bytes(b"half")
    images, _ = read(f"file://{shards}", stage, everything, seed=2, epochs=2)
    assert same(images, read(shards, tmp_path, seed=2, epochs=2)[0])
    assert fetched(stage)[count:] == [f"train/{first.name}"]
    check_usage(stage, everything)


def test_a_killed_fetcher_is_replaced_and_a_killed_rank_counts_no_more(shards, downloads, limit, ranks, tmp_path):
    stage = tmp_path / "fast"
    downloads.delay_s = 0.05
    first = ranks.start("s3://bucket/set", stage, limit, epochs=20)
    folder = wait_for(lambda: next((CacheFolder(root) for root in stage.glob("*-stream")), None))
    fetcher = wait_for(lambda: folder.log.exists() and re.search(r" (\d+) INFO fetched", folder.log.read_text()))
    os.kill(int(fetcher[1]), signal.SIGKILL)
    wait_for(lambda: len(set(re.findall(r" (\d+) INFO fetched", folder.log.read_text()))) == 2)
    (client,) = folder.clients.glob("*.json")
    first.kill()
    first.join()
    ranks.processes.clear()
    wait_for(lambda: f"{client.stem} has ended" in folder.log.read_text())
    assert not list(folder.clients.glob("*.json"))
    wait_for(lambda: not is_locked(folder.lock))
    check_usage(stage, limit)


@contextlib.contextmanager
def new_cache(shards: Path, source: str, stage: Path, window: int = WINDOW, **options: Any) -> Iterator[Any]:
    """Yields a function that reads one sample through a cache."""
    index, _ = open_splits(str(shards), "train", "val", stage.parent)
    order = WindowedOrder(0, index.first_rows_S1, window)
    arguments = {"stop": TRAIN, "limit": 10**9, "hang_timeout_s": 2.0} | options
    with ShardCache(index, order, source, stage, **arguments) as cache:
        yield cache.readable(index).read


@pytest.mark.slow
def test_a_store_that_does_not_recover_ends_the_run(shards, downloads, tmp_path):
    downloads.error_of = lambda name, request: "500"
    with new_cache(shards, "s3://bucket/set", tmp_path / "fast", hang_timeout_s=15) as read_sample:
        message = r"cannot be fetched: \d+ tries in \d+ s failed, the last one with .*check the network and the store"
        with pytest.raises(DataError, match=rf"shard train/\S+ of s3://bucket/set {message}"):
            read_sample(0)
        downloads.error_of = lambda name, request: None
        assert len(read_sample(0)) > 100, "a later try succeeds"


def test_errors_that_do_not_pass_are_raised_at_once(shards, downloads, tmp_path, monkeypatch):
    files, name = fsspec.filesystem("s3"), next(iter(open_splits(str(shards), "train", "val", tmp_path)[0].shards))
    content = files.cat_file(f"bucket/set/{name}")
    cases = {
        "its SHA-256 differs from the index in 3 tries.*densenet data verify": bytes([content[0] ^ 1]) + content[1:],
        f"it has {len(content) - 10:,} bytes, the index has {len(content):,}": content[:-10],
        "it does not exist. To continue, copy the data set there again": None,
    }
    for number, (message, stored) in enumerate(cases.items()):
        if stored is None:
            files.rm_file(f"bucket/set/{name}")
        else:
            files.pipe_file(f"bucket/set/{name}", stored)
        with (
            new_cache(shards, "s3://bucket/set", tmp_path / str(number), hang_timeout_s=1800) as read_sample,
            pytest.raises(DataError, match=f"shard {name} of s3://bucket/set cannot be fetched: {message}"),
        ):
            read_sample(0)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with (
        new_cache(shards, "s3://bucket/set", tmp_path / "refused", hang_timeout_s=1800) as read_sample,
        pytest.raises(DataError, match="NoCredentialsError.*set the credentials in the environment"),
    ):
        read_sample(0)


def test_a_source_that_needs_a_missing_package_is_named(shards, tmp_path):
    with (
        new_cache(shards, "sharepoint://set", tmp_path / "fast") as read_sample,
        pytest.raises(DataError, match="Protocol not known: sharepoint. To continue, install"),
    ):
        read_sample(0)


def test_runs_that_do_not_fit_together_do_not_block_each_other(shards, tmp_path):
    """The older rank reads its windows; the younger one, whose window does not fit, gets an error with the reason."""
    index, _ = open_splits(str(shards), "train", "val", tmp_path)
    size = 2 * WINDOW * max(split_bytes(shards)["train"])
    orders = [WindowedOrder(seed, index.first_rows_S1, 2 * WINDOW) for seed in (0, 1)]
    arguments = {"stop": TRAIN, "limit": size, "hang_timeout_s": 15}
    with (
        ShardCache(index, orders[0], str(shards), tmp_path / "fast", **arguments) as older,
        ShardCache(index, orders[1], str(shards), tmp_path / "fast", **arguments) as younger,
    ):
        starts = [order.windows(0).first_offsets_W1.tolist() for order in orders]
        own, other = (set(order.windows(0).shards(0).tolist()) for order in orders)
        missing = index.files[min(other - own)]
        for cache in (older, younger):
            next(cache.follow(iter([positions(0)])))
        with pytest.raises(DataError, match=f"{missing} did not come .* data.stage_limit for the windows of all"):
            younger.open(cache_folder(tmp_path / "fast").root / missing)
        next(older.follow(iter([positions(starts[0][-1])])))
        assert younger.open(cache_folder(tmp_path / "fast").root / missing).read(0, 1)


def positions(first: int) -> PlannedBatch:
    """Returns a batch of one sample at a position, of which only the position matters."""
    nothing = np.zeros((1, 2), np.int32)
    one = np.array([first])
    return PlannedBatch(one, one, one, nothing, nothing, nothing, nothing, nothing[0], 8)


def read_on_small_disk(shards: Path, mount: Path, limit: int) -> None:
    """Reads through a cache on a file system that is smaller than the limit (in a user's mount namespace)."""
    images, _ = read(shards, mount, limit, seed=1, epochs=2)
    assert same(images, read(shards, mount.parent, seed=1, epochs=2)[0])
    print(cache_folder(mount).log.read_text())


@pytest.mark.slow
def test_a_full_disk_is_no_error_while_what_is_read_fits(shards, tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    size = sum(split_bytes(shards)["train"]) // 2
    code = (
        "from pathlib import Path; from tests.data.test_streaming import read_on_small_disk; "
        f"read_on_small_disk(Path('{shards}'), Path('{mount}'), 10**9)"
    )
    commands = f'mount -t tmpfs -o size={size} tmpfs {mount} && {sys.executable} -c "{code}"'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", commands], capture_output=True, text=True, cwd=PROJECT)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("this machine does not allow mount namespaces")
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout
    assert "ERROR" not in done.stdout


def test_a_limit_without_a_folder_and_sizes_that_are_none_are_named(shards, tmp_path):
    with pytest.raises(UserError, match=r"stage_limit=5 limits the disk space in stage: pass stage=FOLDER"):
        pipeline.open_dataset(shards, stage_limit=5)
    with pytest.raises(UserError, match=r"stage_limit=5 apples is not a number of bytes: use for example 200GB"):
        pipeline.open_dataset(shards, stage=tmp_path, stage_limit="5 apples")
