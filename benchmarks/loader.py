"""Data loading speed for training at 224 pixels: this loader, other packages' loaders, and libjpeg-turbo alone.

    python -m benchmarks.loader [--images FOLDER] [--rounds 5] [--count 2048]

The benchmark copies the folder's JPEGs (synthetic ones by default) to class folders and prepares them as shards, with
the original size and with a shorter side of 400 pixels. All loaders decode the same images on the same cores, with
random resized crop and flip.
"""

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simplejpeg

from benchmarks.common import interleaved, load_images, report, seconds
from benchmarks.loader_peers import BATCH, CORES, MEAN, SIDE, STD, installed_peers, samples
from pipeline.data.dali import Loader
from pipeline.data.dataset import open_splits
from pipeline.data.plan import TrainPlan, micro_batch
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare


def main() -> None:
    """Measures the original images, then images with a shorter side of 400 pixels."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=2048, help="training images; a multiple of the batch size")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_class_folders(load_images(options.images, root), root / "original", options.count)
        measure("loader, original JPEGs", root / "original", options.rounds)
        with Pool(CORES) as pool:
            small = PrepareOptions(to="folders", shorter_side=400, quality=90)
            prepare(root / "original", root / "small", small, pool)
        measure("loader, shorter side 400", root / "small", options.rounds)


def write_class_folders(files: list[Path], root: Path, count: int) -> None:
    """Writes `count` copies of the images in eight training classes, and a small validation split."""
    for split, number in (("train", count), ("val", 8)):
        for i in range(number):
            target = root / split / f"n{i % 8:08d}" / f"{i:05d}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[i % len(files)], target)


def measure(name: str, folders: Path, rounds: int) -> None:
    """Measures all loaders on the same images."""
    shards, work = (folders.with_name(f"{folders.name}-{kind}") for kind in ("shards", "peers"))
    work.mkdir()
    with Pool(CORES) as pool:
        prepare(folders, shards, PrepareOptions(shard_bytes=16_000_000), pool)
    cases = {
        "this loader, shards": our_loader(shards),
        "this loader, class folders": our_loader(folders),
        "libjpeg-turbo alone": libjpeg_turbo(folders / "train"),
        **installed_peers(folders, shards, work),
    }
    timed = {case: throughput(epoch) for case, epoch in cases.items()}
    report(name, interleaved(timed, rounds), "img/s", "this loader, shards")


def throughput(epoch: Callable[[], Iterable[int]]) -> Callable[[], float]:
    """Returns a function that measures images per second over one epoch; `epoch` yields batch sizes.

    Worker processes exist already, from the warm-up round.
    """

    def measured() -> float:
        counts: list[int] = []
        elapsed = seconds(lambda: counts.extend(epoch()))
        return sum(counts) / elapsed

    return measured


def our_loader(root: Path) -> Callable[[], Iterable[int]]:
    index, _ = open_splits(str(root), "train", "val", root.parent / f"{root.name}-cache")
    plan = TrainPlan(0, index.widths_N, index.heights_N, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    loader = Loader(
        index,
        device="cpu",
        device_id=None,
        threads=CORES,
        max_batch_size=BATCH,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
    )
    epochs = iter(range(1000))

    def epoch() -> Iterable[int]:
        per_epoch = len(index) // BATCH
        first = next(epochs) * per_epoch
        steps = range(first, first + per_epoch)
        return (
            len(batch.labels_N)
            for batch in loader.run(plan.batch(micro_batch(step, 0, 0, 1, BATCH, 1), SIDE) for step in steps)
        )

    return epoch


def libjpeg_turbo(split: Path) -> Callable[[], Iterable[int]]:
    """Reads and decodes whole files, and does nothing else: the rate that decoding whole images cannot exceed."""
    files = [path for path, _ in samples(split)]

    def decode(file: str) -> int:
        simplejpeg.decode_jpeg(Path(file).read_bytes())
        return 1

    pool = ThreadPoolExecutor(CORES)
    return lambda: pool.map(decode, files)


if __name__ == "__main__":
    main()
