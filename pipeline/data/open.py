"""A data set in anyone's training loop: the stateless plan and its pixels, without the rest of the pipeline."""

import os
import warnings
from collections.abc import Callable, Generator, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import MAX_PIXELS, Device, RunConfig
from pipeline.data.dataset import check_sizes, open_split, open_splits, read_manifest
from pipeline.data.folders import list_classes
from pipeline.data.generated import generate_data
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, PlannedBatch, TrainPlan, eval_share, micro_batch
from pipeline.errors import DataError, UserError
from pipeline.extension_points import is_generated

if TYPE_CHECKING:
    from pipeline.data.dali import Batch, Loader

_WHOLE = "all"  # the split of a folder that holds class folders itself
_SIDES = range(8, 1025)


def open_dataset(
    place: str | Path,
    *,
    train: str = "train",
    stage: str | Path | None = None,
    cache: str | Path = "outputs",
    max_pixels: int = MAX_PIXELS,
) -> "Dataset":
    """Opens a data set; images are not read yet.

    Args:
        place: A prepared data set's folder, a folder with class folders in each split, or with class folders alone; an
            address (`s3://bucket/set`); or `digits://`, the demonstration's handwritten digits.
        train: The training split: class folders of other splits are labeled by its classes.
        stage: For an address: a folder on this machine's own disk, to which shards are copied.
        cache: Folder for what is remembered of class folders and addresses: the `run.output` of trainings.
        max_pixels: Images of more pixels are refused.

    Raises:
        DataError: there is no such data set, or it is not laid out as it must be.
    """
    return Dataset(place, train, None if stage is None else Path(stage), Path(cache).absolute(), max_pixels)


def data_folder(place: str | Path, cache: Path) -> Path:
    """The folder that a user means; the images of a data source (`digits://`) are made below `cache` first."""
    return Path(generate_data(str(place), cache)).expanduser()


class Dataset:
    """Class names, splits and batches of a data set, from `open_dataset`.

    `root` is its folder; `splits` are the splits' names.
    """

    def __init__(self, place: str | Path, train: str, stage: Path | None, cache: Path, max_pixels: int) -> None:
        self._train, self._stage, self._cache, self._max_pixels = train, stage, cache, max_pixels
        self._address: str | None = None
        self._indexes: dict[str, DatasetIndex] = {}
        if "://" in str(place) and not is_generated(str(place)):
            self._address = str(place)
            self.root = self._fetched(self._address)
        else:
            self.root = data_folder(place, cache)
        manifest = read_manifest(self.root)
        if manifest is None and not self.root.is_dir():
            raise DataError(f"{place} is not a folder: give a data set's folder, or one that holds SPLIT/CLASS/*.")
        self._is_prepared = manifest is not None
        self.splits: tuple[str, ...] = tuple(manifest.splits) if manifest is not None else self._split_folders()
        self._classes = None if manifest is None else manifest.classes

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the labels: those of the training split."""
        if self._classes is not None:
            return self._classes
        name = self._train if self._train in self.splits else self.splits[0]
        return tuple(list_classes(self.root if name == _WHOLE else self.root / name))

    @property
    def sizes(self) -> dict[str, int]:
        """The images of each split; class folders without an index are looked at first, file by file."""
        return {split: len(self.index(split)) for split in self.splits}

    def index(self, split: str) -> DatasetIndex:
        """Where each image of a split lies, its label and its size.

        Raises:
            DataError: there is no such split, or something in it is corrupt.
        """
        if split not in self._indexes:
            self._indexes[split] = self._opened(split)
        return self._indexes[split]

    def __repr__(self) -> str:
        return f"Dataset({self._address or self.root}: {', '.join(self.splits)}; {len(self.classes)} classes)"

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int | None = None,
        start: int = 0,
        stop: int | None = None,
        epochs: float | None = None,
        rank: int = 0,
        world_size: int = 1,
        image_size: int | None = None,
        device: Device = "cpu",
        training: bool | None = None,
        config: RunConfig | None = None,
    ) -> "Batches":
        """This rank's batches of a split, ready for a model.

        In training the samples come in the run's one order: an epoch is a permutation that follows from the seed, and
        crop, flip and augmentations of each sample follow from seed, epoch and sample. So the global batches are the
        same at any `world_size`, and a loop goes on where another ended: with `start`, and no state. A batch may hold
        the end of one epoch and the start of the next one, so that all are of one size. In evaluation each image
        comes once over all ranks, and the last batch may be smaller.

        Args:
            split: One of `splits`.
            batch_size: Images of a step over all ranks; each rank gets `batch_size / world_size` of them.
            seed: Of order, crops and augmentations; default: `config.run.seed`, which is 0.
            start: Samples that all ranks have seen before: the place in the run's order.
            stop: Ends with the first batch that reaches this place; default: the end of the epoch of `start`.
            epochs: The same in passes from the run's beginning.
            rank: Of this process, from 0.
            world_size: Number of processes.
            image_size: Side of the images, pixels; default: the config's, 224. In evaluation it is the crop's, and
                the shorter side is resized in the config's ratio, 256 / 224.
            device: Where images are decoded and where the batches lie; the current one of `cuda`.
            training: Whether to shuffle and to augment; default: for the split that is trained on alone.
            config: Everything else, as `load_config` gives it: `data.*` (crops, flip, mean and std, corrupt images),
                `augment.*`, `eval.*`, `model.in_chans`. Without one, torchvision's usual values.

        Raises:
            UserError: a value does not fit.
            DataError: there is no such split; and, from the loop, an image is corrupt or has gone.
        """
        config = config or RunConfig()
        training = split == self._train if training is None else training
        _check_share(batch_size, rank, world_size)
        _check_device(device)
        if image_size is not None and image_size not in _SIDES:
            raise UserError(f"image_size={image_size} must be from {_SIDES.start} to {_SIDES.stop - 1} pixels.")
        index = self.index(split)
        share = batch_size // world_size
        if not training:
            for name, value in (("start", start or None), ("stop", stop), ("epochs", epochs)):
                if value is not None:
                    raise UserError(f"{name}={value} has no effect where each image comes once: leave it out.")
            plan = eval_plan(config, index, image_size)
            planned = (plan.batch(ids_B) for ids_B in eval_share(len(index), rank, world_size, share))
            own = (rank + 1) * len(index) // world_size - rank * len(index) // world_size
            return Batches(partial(_loader, config, index, share, device, None), planned, -(-own // share))
        order = train_plan(config, index, seed)
        steps = _steps(start, stop, epochs, len(index), batch_size)
        if config.augment.mixes_images and (share % 2 or start % 2):
            raise UserError(
                f"augment.mixup_alpha and augment.cutmix_alpha mix pairs of images: batch_size={batch_size} gives {share} to "
                f"each rank from start={start}, and both must be even."
            )
        places = (start + micro_batch(step, 0, rank, world_size, share, 1) for step in range(steps))
        sides = (
            config.data
            if image_size is None
            else config.data.model_copy(update={"image_size": image_size, "progressive_resize": ()})
        )
        planned = (order.batch(positions_B, sides.image_size_at(positions_B[0] / len(index))) for positions_B in places)
        return Batches(partial(_loader, config, index, share, device, order), planned, steps)

    def _split_folders(self) -> tuple[str, ...]:
        """The folders that hold class folders, the training split first."""
        there = [p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")]
        splits = sorted(p.name for p in there if any(entry.is_dir() for entry in p.iterdir()))
        return tuple(sorted(splits, key=lambda name: name != self._train)) or (_WHOLE,)

    def _opened(self, split: str) -> DatasetIndex:
        if split not in self.splits:
            raise DataError(f"{self.root} has no split '{split}', it has {', '.join(self.splits)}: correct the name.")
        cache = self._cache / "index"
        if self._address is not None:
            return self._staged(self._address, split)
        if self._is_prepared or split == self._train or self._train not in self.splits:
            return open_split(self.root, split, cache, self._max_pixels)
        warn = partial(warnings.warn, stacklevel=4)
        train, other = open_splits(str(self.root), self._train, split, cache, warn=warn, max_pixels=self._max_pixels)
        self._indexes[self._train] = train
        return other

    def _fetched(self, address: str) -> Path:
        from pipeline.data.staging import fetch_indexes, remote_folder

        if self._stage is None:
            raise DataError(f"{address} is an address: give stage=FOLDER on this machine's own disk.")
        fetch_indexes(address, (), self._cache / "index")
        return remote_folder(address, self._cache / "index")

    def _staged(self, address: str, split: str) -> DatasetIndex:
        from pipeline.data.staging import fetch_indexes, stage

        (index,) = fetch_indexes(address, (split,), self._cache / "index")
        check_sizes(index, self._max_pixels)
        assert self._stage is not None
        return stage(index, address, self._stage)


class Batches:
    """Batches in the order of the plan: `len` of them. Reading runs ahead in threads while the loop has one.

    They end with the loop; one that is left earlier is closed by `close`, by a `with` block around it, or when nothing
    refers to it any longer. `skipped` tells of the corrupt images that were replaced so far (`data.on_corrupt=skip`),
    by their row in the index.
    """

    def __init__(self, loader: Callable[[], "Loader"], planned: Iterator[PlannedBatch], count: int) -> None:
        self.skipped: dict[int, str] = {}
        self._count = count
        self._batches = _run(loader, planned, self.skipped)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> "Batch":
        return next(self._batches)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and frees the memory; there are no further batches."""
        self._batches.close()


def _run(
    new_loader: Callable[[], "Loader"], planned: Iterator[PlannedBatch], skipped: dict[int, str]
) -> Generator["Batch"]:
    """A loader lives as long as this generator, which refers to nobody that refers to it."""
    with new_loader() as loader:
        for batch in loader.run(planned):
            skipped.update(loader.skipped)
            yield batch


def train_plan(config: RunConfig, index: DatasetIndex, seed: int | None = None) -> TrainPlan:
    """The order and the crops of a run's training samples; `seed` is the config's by default.

    Raises:
        UserError: the windowed shuffle is asked for, and there are no shards.
    """
    data = config.data
    if data.shuffle == "windowed" and not index.shards:
        raise UserError("data.shuffle=windowed mixes within windows of shards, and there are none: use full.")
    return TrainPlan(
        seed=config.run.seed if seed is None else seed,
        widths_N=index.widths_N,
        heights_N=index.heights_N,
        scale=data.scale,
        ratio=data.ratio,
        hflip=data.hflip,
        files_N=index.files_N if data.shuffle == "windowed" else None,
        window=data.window,
        augment=config.augment,
    )


def eval_plan(config: RunConfig, index: DatasetIndex, crop: int | None = None) -> EvalPlan:
    """Resize and crop of a run's evaluation; another `crop` keeps its ratio to the resize."""
    resize = config.eval.resize if crop is None else int(crop * config.eval.resize / config.eval.crop)
    return EvalPlan(index.widths_N, index.heights_N, resize, crop or config.eval.crop)


def _loader(
    config: RunConfig, index: DatasetIndex, batch_size: int, device: Device, order: TrainPlan | None
) -> "Loader":
    """A loader of the training samples in `order`, or, without one, of the images as evaluation sees them."""
    from pipeline.data.dali import Loader

    data, device_id = config.data, None
    if device == "cuda":
        import torch

        device_id = torch.cuda.current_device()
    return Loader(
        index,
        device=device,
        device_id=device_id,
        threads=len(os.sched_getaffinity(0)) if data.threads == "auto" else data.threads,
        readers=data.readers,
        max_batch_size=batch_size,
        interpolation=data.interpolation if order is not None else config.eval.interpolation,
        mean=data.mean,
        std=data.std,
        augment=config.augment if order is not None else None,
        skip_by=order if data.on_corrupt == "skip" else None,
        channels=config.model.in_chans,
        num_classes=config.model.num_classes,
    )


def _check_share(batch_size: int, rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"rank={rank} must be from 0 to world_size - 1, and world_size is {world_size}.")
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"batch_size={batch_size} counts the images of a step over all ranks: it must be a multiple of "
            f"world_size={world_size}."
        )


def _check_device(device: Device) -> None:
    if device not in ("cpu", "cuda"):
        raise UserError(f"device={device} is not known: use cpu, or cuda for the current GPU (torch.cuda.set_device).")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("device=cuda: torch finds no GPU here. Use cpu.")


def _steps(start: int, stop: int | None, epochs: float | None, num_samples: int, batch_size: int) -> int:
    """How many batches there are from `start` to the end."""
    if stop is not None and epochs is not None:
        raise UserError(f"stop={stop} and epochs={epochs} both say where the batches end: give one of them.")
    if epochs is not None:
        stop = round(epochs * num_samples)
    if stop is None:
        stop = (start // num_samples + 1) * num_samples
    if not 0 <= start <= stop:
        raise UserError(f"start={start} must be from 0 to the end of the batches, which is at {stop} samples.")
    return -(-(stop - start) // batch_size)
