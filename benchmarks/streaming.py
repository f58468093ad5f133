"""Training images from an object store through a cache of a third of the data, next to the same from a local folder.

    python -m benchmarks.streaming [--images FOLDER] [--rounds 2] [--count 6144]

The store is a process on the same cores, which adds a latency to each request. Two epochs are measured after one that
fills the cache: images per second, and the part of the data that came from the cache, next to the optimum.
"""

import argparse
import multiprocessing
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

import pipeline
from benchmarks.common import interleaved, load_images, report, save_result
from benchmarks.loader import write_class_folders
from benchmarks.loader_peers import BATCH, CORES, SIDE
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare

BENCHMARK = "training images, shards of 12 MB, cache of a third of the data"
SHARD_BYTES = 12_000_000
WINDOW = 4  # shards
CONFIG = {"data": {"shuffle": "windowed", "window": WINDOW, "image_size": SIDE}}
EPOCHS = 3
LATENCIES_MS = (0, 50)

Case = Callable[[], tuple[float, float]]  # images per second, and the part of an epoch that was downloaded


def main() -> None:
    """Measures the local folder and the object store, with each latency."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--count", type=int, default=6144, help="training images; a multiple of the batch size")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_class_folders(load_images(options.images, root), root / "images", options.count)
        with Pool(CORES) as pool:
            prepare(root / "images", root / "bucket" / "set", PrepareOptions(shard_bytes=SHARD_BYTES), pool)
        cases: dict[str, Case] = {"local folder": partial(measure_local, root, options.count)}
        for latency_ms in LATENCIES_MS:
            cases[f"object store, {latency_ms} ms"] = partial(measure, root, options.count, latency_ms)
        downloaded: dict[str, list[float]] = {name: [] for name in cases}

        def speed(name: str) -> float:
            img_per_s, part = cases[name]()
            downloaded[name].append(part)
            return img_per_s

        values = interleaved({name: partial(speed, name) for name in cases}, options.rounds)
    report(BENCHMARK, values, "img/s", ours=f"object store, {LATENCIES_MS[-1]} ms")
    for name in list(cases)[1:]:
        from_disk = 100 * (1 - statistics.median(downloaded[name]))
        print(f"  {name}: {from_disk:.0f} % of an epoch from the cache; at best 33 %")
        save_result(f"{BENCHMARK}: part of an epoch from the cache, at best 33 %", name, from_disk, "%")


def measure_local(root: Path, count: int) -> tuple[float, float]:
    """Measures this loader on the local folder."""
    data = pipeline.open_dataset(root / "bucket" / "set")
    batches = data.batches("train", BATCH, epochs=EPOCHS, config=pipeline.load_config(CONFIG))
    return steady((len(batch.labels_N) for batch in batches), count, lambda: 0)


def measure(root: Path, count: int, latency_ms: int) -> tuple[float, float]:
    """Measures this loader on the object store."""
    size = folder_bytes(root / "bucket" / "set" / "train")
    limit = size // 3 + folder_bytes(root / "bucket" / "set" / "val")
    with object_store(root / "bucket", latency_ms) as sent, tempfile.TemporaryDirectory() as disk:
        data = pipeline.open_dataset("s3://bucket/set", stage=disk, stage_limit=limit, cache=Path(disk) / "indexes")
        batches = data.batches("train", BATCH, epochs=EPOCHS, config=pipeline.load_config(CONFIG))
        img_per_s, sent_bytes = steady((len(batch.labels_N) for batch in batches), count, sent)
        return img_per_s, sent_bytes / size


def steady(sizes: Iterable[int], count: int, sent: Callable[[], int]) -> tuple[float, float]:
    """Returns images per second and bytes sent per epoch, after the first epoch of `count` images."""
    seen, started, bytes_before = 0, 0.0, 0
    for batch_size in sizes:
        seen += batch_size
        if started == 0 and seen >= count:
            first, started, bytes_before = seen, time.perf_counter(), sent()
    elapsed = time.perf_counter() - started
    return (seen - first) / elapsed, (sent() - bytes_before) / (EPOCHS - 1)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def object_store(bucket: Path, latency_ms: int) -> Iterator[Callable[[], int]]:
    """Serves a folder as the bucket `bucket` of an S3 store, in a process; yields a function of the bytes sent."""
    context = multiprocessing.get_context("spawn")
    port, sent = context.Value("i", 0), context.Value("q", 0)
    process = context.Process(target=serve, args=(bucket, latency_ms / 1000, port, sent), daemon=True)
    process.start()
    while port.value == 0:
        time.sleep(0.01)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port.value}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    fsspec.filesystem("s3", skip_instance_cache=True).clear_instance_cache()
    try:
        yield lambda: int(sent.value)
    finally:
        process.terminate()
        process.join()


def serve(bucket: Path, latency_s: float, port: Any, sent: Any) -> None:
    """Answers GET (with ranges) and HEAD of objects; enough of S3 for downloads."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(send_content=False)

        def do_GET(self) -> None:
            self.answer(send_content=True)

        def answer(self, send_content: bool) -> None:
            time.sleep(latency_s)
            file = bucket / urlsplit(self.path).path.removeprefix("/bucket/")
            if not file.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = file.stat().st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, end = 0, size
            if wanted is not None:
                first, end = int(wanted[1]), min(size, int(wanted[2] or size) + 1)
            self.send_response(200 if wanted is None else 206)
            self.send_header("Content-Length", str(end - first))
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
            self.send_header("ETag", '"0"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            if send_content:
                with sent.get_lock():
                    sent.value += end - first
                with file.open("rb") as content:
                    content.seek(first)
                    self.wfile.write(content.read(end - first))

        def log_message(self, format: str, *args: object) -> None:
            """Prints nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.value = server.server_port
    server.serve_forever()


if __name__ == "__main__":
    main()
