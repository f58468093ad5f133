"""Data loading speed for training at 224 pixels: this loader, torchvision, timm, webdataset and DALI's file reader.

    python -m benchmarks.loader [--images FOLDER] [--rounds 5]

The benchmark copies the folder's JPEGs (synthetic ones by default) to 2,048 files in class folders and prepares them as
shards, with the original size and with a shorter side of 400 pixels. All loaders decode the same images on the same
cores, with random resized crop and flip.
"""

import argparse
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.common import interleaved, load_images, report, seconds
from pipeline.data.dali import Loader
from pipeline.data.dataset import open_splits
from pipeline.data.plan import TrainPlan, micro_batch
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, BATCH, IMAGES = 224, 64, 2048
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Measures the original images, then images with a shorter side of 400 pixels."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_class_folders(load_images(options.images, root), root / "original", IMAGES)
        measure("loader, original JPEGs", root / "original", root / "original-shards", options.rounds)
        with Pool(CORES) as pool:
            small = PrepareOptions(to="folders", shorter_side=400, quality=90)
            prepare(root / "original", root / "small", small, pool)
        measure("loader, shorter side 400", root / "small", root / "small-shards", options.rounds)


def write_class_folders(files: list[Path], root: Path, count: int) -> None:
    """Writes `count` copies of the images in eight training classes, and a small validation split."""
    for split, number in (("train", count), ("val", 8)):
        for i in range(number):
            target = root / split / f"n{i % 8:08d}" / f"{i:05d}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[i % len(files)], target)


def measure(name: str, folders: Path, shards: Path, rounds: int) -> None:
    """Measures all loaders on the same images."""
    with Pool(CORES) as pool:
        prepare(folders, shards, PrepareOptions(shard_bytes=16_000_000), pool)
    cases = {
        "this loader, shards": our_loader(shards),
        "this loader, class folders": our_loader(folders),
        "DALI's file reader": dali_reader(folders / "train"),
        "torchvision": batch_sizes(torchvision_loader(folders / "train", BATCH)),
        "timm": batch_sizes(timm_loader(folders / "train", BATCH)),
        "webdataset": webdataset_loader(shards / "train"),
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
        first = next(epochs) * IMAGES // BATCH
        steps = range(first, first + IMAGES // BATCH)
        return (
            len(batch.labels_N)
            for batch in loader.run(plan.batch(micro_batch(step, 0, 0, 1, BATCH, 1), SIDE) for step in steps)
        )

    return epoch


def dali_reader(split: Path) -> Callable[[], Iterable[int]]:
    """NVIDIA's recipe: DALI's file reader, `image_random_crop`, resize, normalize."""
    import nvidia.dali.types as types
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    @pipeline_def(batch_size=BATCH, num_threads=CORES, device_id=None)
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(file_root=str(split), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(encoded, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.resize(images, resize_x=SIDE, resize_y=SIDE, interp_type=types.INTERP_TRIANGULAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            mean=[255 * m for m in MEAN],
            std=[255 * s for s in STD],
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        return images, labels

    iterator = DALIGenericIterator(
        [pipeline()],
        ["images", "labels"],
        reader_name="reader",
        last_batch_policy=LastBatchPolicy.DROP,
        auto_reset=True,
    )
    return lambda: (len(batch[0]["labels"]) for batch in iterator)


def torchvision_transform() -> Any:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def batch_sizes(loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], Iterable[int]]:
    return lambda: (len(labels) for _, labels in loader)


def torchvision_loader(split: Path, batch: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """The loader of torchvision's reference training script, with persistent workers."""
    dataset = ImageFolder(str(split), torchvision_transform())
    return DataLoader(dataset, batch, shuffle=True, num_workers=CORES, drop_last=True, persistent_workers=True)


def timm_loader(split: Path, batch: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """timm's loader with the same augmentation only."""
    from timm.data import create_dataset, create_loader

    return create_loader(
        create_dataset("", root=str(split)),
        input_size=(3, SIDE, SIDE),
        batch_size=batch,
        is_training=True,
        use_prefetcher=False,
        color_jitter=None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=CORES,
        device=torch.device("cpu"),
    )


def webdataset_loader(split: Path) -> Callable[[], Iterable[int]]:
    """The webdataset package on the same shards, with torchvision's transforms."""
    import webdataset

    files = sorted(str(file) for file in split.glob("*.tar"))
    transform = torchvision_transform()
    dataset = (
        webdataset.WebDataset(files, shardshuffle=len(files), seed=0, workersplitter=webdataset.split_by_worker)
        .shuffle(200)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH, partial=False)
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=CORES, persistent_workers=True)
    return lambda: (len(labels) for _, labels in loader)


if __name__ == "__main__":
    main()
