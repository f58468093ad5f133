"""Training images from an object store through a cache of a third of the data, next to the same from a local folder.

    python -m benchmarks.streaming [--images FOLDER] [--rounds 3] [--count 2048]

The store is a process on the same cores, which adds a latency to each request. Two epochs are measured after one that
fills the cache: images per second, and the part of the data that came from the cache, next to the optimum.
"""

import argparse
import importlib.util
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
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from PIL import Image
from torch.utils.data import DataLoader

import pipeline
from benchmarks.common import interleaved, load_images, machine
from benchmarks.loader import write_class_folders
from benchmarks.loader_peers import BATCH, CORES, SIDE, samples, transform
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare

SHARD_BYTES = 4_000_000
CONFIG = {"data": {"shuffle": "windowed", "window": 4, "image_size": SIDE}}
EPOCHS = 3
LATENCIES_MS = (0, 50)

Case = Callable[[], tuple[float, float]]  # images per second, and the part of an epoch that was downloaded


def main() -> None:
    """Measures this loader and mosaicml-streaming, if it is installed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=2048, help="training images; a multiple of the batch size")
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
        if importlib.util.find_spec("streaming") is None:
            print("not installed, skipped: mosaicml-streaming")
        else:
            write_mosaic(root / "images" / "train", root / "bucket" / "mosaic")
            for latency_ms in LATENCIES_MS:
                name = f"mosaicml-streaming, {latency_ms} ms"
                cases[name] = partial(measure_mosaic, root, options.count, latency_ms)
        downloaded: dict[str, list[float]] = {name: [] for name in cases}

        def speed(name: str) -> float:
            img_per_s, part = cases[name]()
            downloaded[name].append(part)
            return img_per_s

        values = interleaved({name: partial(speed, name) for name in cases}, options.rounds)
    print(f"\n{machine()}, medians of {options.rounds} rounds; the optimum is {1 / 3:.0%} of an epoch from the cache")
    local = values["local folder"]
    for name, speeds in values.items():
        ratios = [value / other for value, other in zip(speeds, local, strict=True)]
        print(
            f"  {name:26} {statistics.median(speeds):6.0f} img/s, {statistics.median(ratios):.2f} x local "
            f"({min(ratios):.2f} - {max(ratios):.2f}), {1 - statistics.median(downloaded[name]):.0%} from disk"
        )


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


def write_mosaic(split: Path, folder: Path) -> None:
    """Writes mosaicml-streaming's shards of the same images."""
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
        for path, label in samples(split):
            writer.write({"image": Path(path).read_bytes(), "label": label})


def measure_mosaic(root: Path, count: int, latency_ms: int) -> tuple[float, float]:
    """Measures mosaicml-streaming with the same limit, torchvision's transforms and PyTorch's `DataLoader`."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    size = folder_bytes(root / "bucket" / "mosaic")
    apply = transform()

    class Transformed(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return apply(Image.open(BytesIO(sample["image"])).convert("RGB")), sample["label"]

    with object_store(root / "bucket", latency_ms) as sent, tempfile.TemporaryDirectory() as disk:
        dataset = Transformed(
            remote="s3://bucket/mosaic", local=disk, shuffle=True, batch_size=BATCH, cache_limit=size // 3
        )
        loader = DataLoader(dataset, BATCH, num_workers=CORES, drop_last=True, persistent_workers=True)
        sizes = (len(labels) for _ in range(EPOCHS) for _, labels in loader)
        img_per_s, sent_bytes = steady(sizes, count, sent)
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
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{port.value}",
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
