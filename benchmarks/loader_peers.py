"""Data loaders of other packages, for `benchmarks.loader`: the same JPEGs, random resized crop, flip and normalization.

Each function prepares a data set in the package's own format where it has one, and returns a function that yields the
batch sizes of an epoch. `make bench` installs the packages in an environment of their own (requirements-peers.txt).
"""

import importlib.util
import os
import random
from collections.abc import Callable, Iterable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, BATCH = 224, 64
CORES = len(os.sched_getaffinity(0))

Epoch = Callable[[], Iterable[int]]


def installed_peers(folders: Path, shards: Path, work: Path) -> dict[str, Epoch]:
    """Returns the loaders of the installed packages, and prints the others.

    `folders` has class folders, `shards` this project's shards of the same images; `work` is an empty folder for
    data sets in other formats.
    """
    split = folders / "train"
    peers: dict[str, tuple[str, Callable[[], Epoch]]] = {
        "DALI's file reader": ("nvidia.dali", lambda: dali_reader(split)),
        "torchvision": ("torchvision", lambda: batch_sizes(torchvision_loader(split))),
        "timm": ("timm", lambda: batch_sizes(timm_loader(split))),
        "webdataset": ("webdataset", lambda: webdataset_loader(shards / "train")),
        "SPDL": ("spdl", lambda: spdl_loader(split)),
        "litdata": ("litdata", lambda: litdata_loader(split, work / "litdata")),
        "mosaicml-streaming": ("streaming", lambda: mosaic_loader(split, work / "mosaic")),
        "Hugging Face datasets": ("datasets", lambda: hugging_face_loader(split, work / "datasets")),
        "FFCV": ("ffcv", lambda: ffcv_loader(split, work / "train.beton")),
    }
    missing = [package for package, _ in peers.values() if importlib.util.find_spec(package) is None]
    if missing:
        print(f"not installed, skipped: {', '.join(missing)}")
    return {name: new() for name, (package, new) in peers.items() if package not in missing}


def transform() -> Any:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def batch_sizes(loader: Iterable[Any]) -> Epoch:
    return lambda: (len(labels) for _, labels in loader)


def samples(split: Path) -> list[tuple[str, int]]:
    """Returns the files and labels of class folders, in a random order."""
    found = list(ImageFolder(str(split)).samples)
    random.Random(0).shuffle(found)
    return found


def dali_reader(split: Path) -> Epoch:
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


def torchvision_loader(split: Path, batch: int = BATCH) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """The loader of torchvision's reference training script, with persistent workers."""
    dataset = ImageFolder(str(split), transform())
    return DataLoader(dataset, batch, shuffle=True, num_workers=CORES, drop_last=True, persistent_workers=True)


def timm_loader(split: Path, batch: int = BATCH) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
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


def webdataset_loader(split: Path) -> Epoch:
    """The webdataset package on this project's shards, with torchvision's transforms."""
    import webdataset

    files = sorted(str(file) for file in split.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(files, shardshuffle=len(files), seed=0, workersplitter=webdataset.split_by_worker)
        .shuffle(200)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform(), int)
        .batched(BATCH, partial=False)
    )
    return batch_sizes(DataLoader(dataset, batch_size=None, num_workers=CORES, persistent_workers=True))


def spdl_loader(split: Path) -> Epoch:
    """SPDL's threads: FFmpeg decodes, crops, resizes and flips; torch normalizes."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    mean_C, std_C = (255 * torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def decoded(sample: tuple[str, int]) -> tuple[Any, int]:
        packets = spdl.io.demux_image(sample[0])
        top, left, height, width = transforms.RandomResizedCrop.get_params(
            torch.empty(0, packets.height, packets.width), (0.08, 1.0), (3 / 4, 4 / 3)
        )
        flip = ",hflip" if random.random() < 0.5 else ""
        filters = f"crop={width}:{height}:{left}:{top},scale={SIDE}:{SIDE}:flags=bilinear{flip},format=rgb24"
        return spdl.io.decode_packets(packets, filter_desc=filters), sample[1]

    def collated(batch: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        images_NHWC = spdl.io.to_torch(spdl.io.convert_frames([frames for frames, _ in batch]))
        images_NCHW = (images_NHWC.permute(0, 3, 1, 2).float() - mean_C) / std_C
        return images_NCHW, torch.tensor([label for _, label in batch])

    def epoch() -> Iterable[int]:
        source = samples(split)
        builder = PipelineBuilder().add_source(source).pipe(decoded, concurrency=CORES)
        pipeline = builder.aggregate(BATCH, drop_last=True).pipe(collated).add_sink(2).build(num_threads=CORES)
        with pipeline.auto_stop():
            for _, labels_N in pipeline:
                yield len(labels_N)

    return epoch


def _encoded(sample: tuple[str, int]) -> dict[str, Any]:
    return {"image": Path(sample[0]).read_bytes(), "label": sample[1]}


def _transformed(sample: dict[str, Any], apply: Callable[[Image.Image], torch.Tensor]) -> tuple[torch.Tensor, int]:
    return apply(Image.open(BytesIO(sample["image"])).convert("RGB")), sample["label"]


def litdata_loader(split: Path, folder: Path) -> Epoch:
    """litdata's optimized chunks of encoded JPEGs, with torchvision's transforms."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    optimize(  # sets the start method of all processes that follow, the other loaders' too
        _encoded, samples(split), str(folder), chunk_bytes="16MB", num_workers=CORES, start_method="fork", verbose=False
    )
    dataset = StreamingDataset(
        str(folder), shuffle=True, drop_last=True, transform=partial(_transformed, apply=transform())
    )
    return batch_sizes(StreamingDataLoader(dataset, batch_size=BATCH, num_workers=CORES, persistent_workers=True))


def mosaic_loader(split: Path, folder: Path) -> Epoch:
    """mosaicml-streaming's MDS shards of encoded JPEGs, with torchvision's transforms."""
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}, size_limit="16mb") as writer:
        for sample in samples(split):
            writer.write(_encoded(sample))

    class Transformed(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            return _transformed(super().__getitem__(at), apply)

    apply = transform()
    dataset = Transformed(local=str(folder), shuffle=True, batch_size=BATCH)
    return batch_sizes(DataLoader(dataset, BATCH, num_workers=CORES, drop_last=True, persistent_workers=True))


def hugging_face_loader(split: Path, folder: Path) -> Epoch:
    """Hugging Face datasets: an Arrow table of encoded JPEGs, with torchvision's transforms."""
    from datasets import Dataset

    dataset = Dataset.from_generator(lambda: map(_encoded, samples(split)), cache_dir=str(folder))
    apply = transform()

    def transformed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = [
            _transformed({"image": i, "label": n}, apply) for i, n in zip(rows["image"], rows["label"], strict=True)
        ]
        return {"image": [image for image, _ in pairs], "label": [label for _, label in pairs]}

    loader: Any = DataLoader(
        dataset.with_transform(transformed),
        BATCH,
        shuffle=True,
        num_workers=CORES,
        drop_last=True,
        persistent_workers=True,
    )
    return lambda: (len(batch["label"]) for batch in loader)


def ffcv_loader(split: Path, file: Path) -> Epoch:
    """FFCV's file of encoded JPEGs, with its own decoder and transforms."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    DatasetWriter(str(file), fields, num_workers=CORES).from_indexed_dataset(ImageFolder(str(split)))
    normalize = NormalizeImage(255 * np.array(MEAN), 255 * np.array(STD), np.float32)
    decoder = RandomResizedCropRGBImageDecoder((SIDE, SIDE))
    pipelines = {
        "image": [decoder, RandomHorizontalFlip(), normalize, ToTensor(), ToTorchImage()],
        "label": [IntDecoder(), ToTensor()],
    }
    loader = Loader(str(file), BATCH, num_workers=CORES, order=OrderOption.RANDOM, drop_last=True, pipelines=pipelines)
    return batch_sizes(loader)
