"""Speed and peak memory of `densenet data prepare` from ImageNet's archives.

    python -m benchmarks.prepare [--images FOLDER] [--rounds 3]

The benchmark copies the folder's JPEGs (synthetic ones by default) to 2,048 files in archives like ILSVRC2012's. It
compares copying with a plain loop over `tarfile`, and re-encoding with Pillow's decode, resize and encode in the same
number of processes.
"""

import argparse
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from PIL import Image
from scipy.io import savemat

from benchmarks.common import interleaved, load_images, report, save_result, seconds
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare

CLASSES, PER_CLASS, SHARD, PER_SHARD = 8, 256, 16_000_000, 160  # images of 0.1 MB
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Measures copying, then re-encoding to a shorter side of 400 at quality 90."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        write_archives(load_images(options.images, Path(folder)), source)
        copying = {
            "densenet data prepare": prepared(source, Path(folder), PrepareOptions(shard_bytes=SHARD)),
            "plain tarfile loop": timed(lambda: tarfile_loop(source, Path(folder, "plain"))),
        }
        report("prepare, copied", interleaved(copying, options.rounds), "img/s", "densenet data prepare")
        small = PrepareOptions(shard_bytes=SHARD, shorter_side=400, quality=90)
        encoding = {
            "densenet data prepare": prepared(source, Path(folder), small),
            "Pillow alone": timed(lambda: pillow(source)),
        }
        report("prepare, re-encoded", interleaved(encoding, options.rounds), "img/s", "densenet data prepare")
        for process, peak in peak_memory(source, Path(folder, "memory")).items():
            print(f"  peak memory, {process}: {peak:.0f} MB")
            save_result("prepare, peak memory", process, peak, "MB")


def peak_memory(source: Path, target: Path) -> dict[str, float]:
    """Returns the peak MB of the main process and of its largest worker, sampled every 20 ms while re-encoding."""
    command = [str(Path(sys.executable).with_name("densenet")), "data", "prepare", str(source), str(target)]
    peaks = {"main process": 0.0, "largest worker": 0.0}
    with subprocess.Popen([*command, "--shorter-side", "400"], stdout=subprocess.DEVNULL) as process:
        main = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                peaks["main process"] = max(peaks["main process"], main.memory_info().rss / 1e6)
                for worker in main.children(recursive=True):
                    peaks["largest worker"] = max(peaks["largest worker"], worker.memory_info().rss / 1e6)
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return peaks


def write_archives(files: list[Path], root: Path) -> None:
    """Writes archives like ILSVRC2012's with copies of the images."""
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for label in range(CLASSES):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for i in range(PER_CLASS):
                    name = f"n{label:08d}_{i}.JPEG"
                    inner.add(files[(label * PER_CLASS + i) % len(files)], name)
            add(outer, f"n{label:08d}.tar", buffer.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as val:
        val.add(files[0], "ILSVRC2012_val_00000001.JPEG")
    meta = io.BytesIO()
    savemat(meta, {"synsets": {"ILSVRC2012_ID": [1], "WNID": ["n00000000"]}})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as kit:
        add(kit, "data/meta.mat", meta.getvalue())
        add(kit, "data/ILSVRC2012_validation_ground_truth.txt", b"1\n")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def timed(function: Callable[[], object]) -> Callable[[], float]:
    return lambda: CLASSES * PER_CLASS / seconds(function)


def prepared(source: Path, folder: Path, options: PrepareOptions) -> Callable[[], float]:
    """Returns a function that measures images per second from scan to complete data set, without process start."""

    def measured() -> float:
        target = folder / "set"
        with Pool(CORES) as pool:
            pool.map(_start, range(CORES), "starting")
            elapsed = seconds(lambda: prepare(source, target, options, pool))
        shutil.rmtree(target)
        return CLASSES * PER_CLASS / elapsed

    return measured


def _start(task: int) -> None:
    """Does nothing; starts a worker process."""


def inner_images(source: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(source / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            stream = outer.extractfile(member)
            assert stream is not None
            with tarfile.open(fileobj=io.BytesIO(stream.read())) as inner:
                for image in inner:
                    content = inner.extractfile(image)
                    assert content is not None
                    yield image.name, content.read()


def tarfile_loop(source: Path, target: Path) -> None:
    """A short script: reads the nested archives and writes shards in reading order, synced to disk."""
    target.mkdir(exist_ok=True)
    images = list(inner_images(source))
    for number, start in enumerate(range(0, len(images), PER_SHARD)):
        with (target / f"{number}.tar").open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as out:
                for name, content in images[start : start + PER_SHARD]:
                    add(out, name, content)
                    add(out, name.replace(".JPEG", ".cls"), name[1:9].encode())
            file.flush()
            os.fsync(file.fileno())


def pillow(source: Path) -> None:
    """Decodes, resizes and encodes the same images in the same number of processes; writes nothing."""
    with multiprocessing.get_context("fork").Pool(CORES) as pool:
        for _ in pool.imap_unordered(_pillow, (content for _, content in inner_images(source)), chunksize=16):
            pass


def _pillow(content: bytes) -> int:
    with Image.open(io.BytesIO(content)) as image:
        rgb = image.convert("RGB")
    short = min(rgb.size)
    if short > 400:
        rgb = rgb.resize((round(rgb.width * 400 / short), round(rgb.height * 400 / short)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=90)
    return buffer.tell()


if __name__ == "__main__":
    main()
