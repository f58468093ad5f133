"""The public data API: a data set's stateless samplers and data loader, for any training loop."""

import warnings
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.config_data import MAX_PIXELS
from pipeline.config_fields import Device
from pipeline.data.batches import Batches, create_loader, eval_plan, train_plan
from pipeline.data.class_list import read_class_list, relabel
from pipeline.data.class_subset import with_classes
from pipeline.data.dataset import check_sizes, open_index, open_split, open_splits, read_manifest
from pipeline.data.folders import list_classes
from pipeline.data.generated import generate_data
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import micro_batch, rank_eval_batches
from pipeline.data.streaming.cache import open_cache
from pipeline.data.streaming.limits import check_limit
from pipeline.errors import DataError, UserError
from pipeline.extension_points import is_generated
from pipeline.formatting import format_bytes, parse_bytes

if TYPE_CHECKING:
    pass

_WHOLE = "all"  # the split name of a folder that directly contains class folders
_SIDES = range(8, 1025)


def open_dataset(
    root: str | Path,
    *,
    train: str = "train",
    stage: str | Path | None = None,
    stage_limit: int | str | None = None,
    cache: str | Path = "outputs",
    classes: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> "Dataset":
    """Opens a data set, without reading images yet.

    Args:
        root: Folder of a prepared data set, folder with SPLIT/CLASS/*, or folder with CLASS/*; a URI
            (`s3://bucket/set`); or `digits://`, the demo's handwritten digits.
        train: Name of the training split; its classes define the labels of all splits.
        stage: For a URI, or an index of shards at another address: folder on this machine's local disk, to which shards
            are copied.
        stage_limit: Maximum disk space in `stage`: bytes, or text such as `200GB`. Then training batches with
            `data.shuffle=windowed` read shards that are fetched ahead of use and evicted after it, also from a folder;
            the other splits are copied whole, and count. An index that is returned does not read images.
        cache: Folder for cached indexes of class folders and URIs; use the `run.output` of training runs.
        classes: File with the classes to use, one per line; a second column is a class's new name, to merge classes.
        max_pixels: Maximum number of pixels of an image; larger ones are errors.

    Raises:
        UserError: `stage_limit` is not a size, or has no `stage`.
        DataError: the data set does not exist, or has the wrong layout.
    """
    if stage_limit is not None and stage is None:
        raise UserError(f"stage_limit={stage_limit} limits the disk space in stage: pass stage=FOLDER too.")
    try:
        limit = None if stage_limit is None else parse_bytes(str(stage_limit))
    except ValueError as error:
        raise UserError(f"stage_limit={error}.") from error
    folder, class_list = (None if path is None else Path(path) for path in (stage, classes))
    return Dataset(root, train, folder, Path(cache).absolute(), class_list, max_pixels, limit)


def resolve_data_root(root: str | Path, cache: Path) -> Path:
    """Returns the folder of a data root; generates the data set of a data source (`digits://`) below `cache`."""
    return Path(generate_data(str(root), cache)).expanduser()


class Dataset:
    """A data set's class names, splits and batches; returned by `open_dataset`.

    `root` is its folder; `splits` are the names of the splits.
    """

    def __init__(
        self,
        root: str | Path,
        train: str,
        stage: Path | None,
        cache: Path,
        classes: Path | None,
        max_pixels: int,
        stage_limit: int | None = None,
    ) -> None:
        self._train, self._stage, self._cache, self._max_pixels = train, stage, cache, max_pixels
        self._class_list, self._stage_limit = classes, stage_limit
        self._uri: str | None = None
        self._indexes: dict[str, DatasetIndex] = {}
        if "://" in str(root) and not is_generated(str(root)):
            self._uri = str(root)
            self.root = self._fetch_indexes(self._uri)
        else:
            self.root = resolve_data_root(root, cache)
        manifest = read_manifest(self.root)
        if manifest is None and not self.root.is_dir():
            raise DataError(f"{root} is not a folder: use a data set's folder, or one that contains SPLIT/CLASS/*.")
        if manifest is not None and manifest.address is not None:
            from pipeline.data.staging import require_stage

            require_stage(manifest.address, str(root), stage, "stage")
        self.splits: tuple[str, ...] = tuple(manifest.splits) if manifest is not None else self._split_folders()
        self._manifest = manifest
        self._shard_bytes = {
            name: sum(shard.bytes for shard in split.shards.values())
            for name, split in (manifest.splits if manifest is not None else {}).items()
        }

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names of the training split, in order of the labels."""
        if self._manifest is not None:
            known = self._manifest.classes
        else:
            name = self._train if self._train in self.splits else self.splits[0]
            known = tuple(list_classes(self.root if name == _WHOLE else self.root / name))
        return known if self._class_list is None else relabel(read_class_list(self._class_list, known), known)[0]

    @property
    def sizes(self) -> dict[str, int]:
        """The number of images of each split; indexes class folders first, file by file."""
        return {split: len(self.index(split)) for split in self.splits}

    def index(self, split: str) -> DatasetIndex:
        """Returns a split's index: each image's location, label and size.

        Raises:
            DataError: there is no such split, or a file in it is corrupt.
        """
        if split not in self._indexes:
            self._indexes[split] = self._open_index(split)
        return self._indexes[split]

    def __repr__(self) -> str:
        return f"Dataset({self._uri or self.root}: {', '.join(self.splits)}; {len(self.classes)} classes)"

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
        """Returns this rank's batches of a split, ready for a model.

        Training uses a stateless sampler: each epoch is a permutation that depends on the seed, and crop, flip and
        augmentations depend on (seed, epoch, sample). So the global batches are the same at any `world_size`, and
        `start` resumes at any sample without other state. All batches have the same size; one may contain the end of an
        epoch and the start of the next. In evaluation, each image occurs once over all ranks, and the last batch may be
        smaller.

        Args:
            split: One of `splits`.
            batch_size: Global batch size: images per step over all ranks. Each rank gets `batch_size / world_size`.
            seed: Seed of order, crops and augmentations; default: `config.run.seed`, which is 0.
            start: Samples that all ranks have already seen: the position in the run's sample order.
            stop: Position that the last batch reaches; default: the end of the epoch of `start`.
            epochs: As `stop`, in epochs from the start of the run.
            rank: Rank of this process, from 0.
            world_size: Number of processes.
            image_size: Side of the images, pixels; default: the config's, 224. In evaluation it is the crop size, and
                the shorter side is resized in the config's ratio, 256 / 224.
            device: Device for decoding and for the batches; `cuda`: the current GPU.
            training: Whether to shuffle and augment; default: only for the training split.
            config: All other settings, from `load_config`: `data.*` (crops, flip, mean and std, corrupt images),
                `augment.*`, `eval.*`, `model.in_chans`. Default: torchvision's usual values.

        Raises:
            UserError: an argument is invalid.
            DataError: there is no such split; or, while iterating, an image is corrupt or missing.
        """
        config = config or RunConfig()
        training = split == self._train if training is None else training
        _check_batch_size(batch_size, rank, world_size)
        _check_device(device)
        if image_size is not None and image_size not in _SIDES:
            raise UserError(f"image_size={image_size} must be from {_SIDES.start} to {_SIDES.stop - 1} pixels.")
        index, streams = self.index(split), False
        if self._stage_limit is not None:
            config = self._with_stage(config)
            streams = training and config.data.streams
            if training:
                check_limit(config.data, index, self._other_bytes(split))
            if not streams:
                index = self._stage_whole(index, split)
        rank_batch = batch_size // world_size
        if not training:
            for name, value in (("start", start or None), ("stop", stop), ("epochs", epochs)):
                if value is not None:
                    raise UserError(
                        f"{name}={value} has no effect in evaluation, where each image occurs once: omit it."
                    )
            plan = eval_plan(config, index, image_size)
            planned = (plan.batch(ids_B) for ids_B in rank_eval_batches(len(index), rank, world_size, rank_batch))
            count = (rank + 1) * len(index) // world_size - rank * len(index) // world_size
            return Batches(
                index, partial(create_loader, config, rank_batch, device, None), planned, -(-count // rank_batch)
            )
        sampler = train_plan(config, index, seed)
        steps = _steps(start, stop, epochs, len(index), batch_size)
        if config.augment.mixes_images and (rank_batch % 2 or start % 2):
            raise UserError(
                f"augment.mixup_alpha and augment.cutmix_alpha mix pairs of images: start={start} and the batch size "
                f"per rank, {rank_batch} of batch_size={batch_size}, must be even."
            )
        positions = (start + micro_batch(step, 0, rank, world_size, rank_batch, 1) for step in range(steps))
        sizes = (
            config.data
            if image_size is None
            else config.data.model_copy(update={"image_size": image_size, "progressive_resize": ()})
        )
        planned = (
            sampler.batch(positions_B, sizes.image_size_at(positions_B[0] / len(index))) for positions_B in positions
        )
        create_cache = None
        if streams:
            create_cache = partial(
                open_cache,
                config.data,
                sampler.seed,
                index,
                self._other_bytes(split),
                stop=start + steps * batch_size,
            )
        return Batches(index, partial(create_loader, config, rank_batch, device, sampler), planned, steps, create_cache)

    def _with_stage(self, config: RunConfig) -> RunConfig:
        """Returns the config with this data set's root and staging."""
        stage = {"root": self._uri or str(self.root), "stage": str(self._stage), "stage_limit": self._stage_limit}
        return config.model_copy(update={"data": config.data.model_copy(update=stage)})

    def _other_bytes(self, split: str) -> int:
        """Returns the size of the other splits' shards, bytes."""
        return sum(size for other, size in self._shard_bytes.items() if other != split)

    def _stage_whole(self, index: DatasetIndex, split: str) -> DatasetIndex:
        """Copies a split below `stage` if it fits the limit."""
        from pipeline.data.staging import stage

        assert self._stage is not None and self._stage_limit is not None
        size = self._shard_bytes.get(split, 0)
        if size > self._stage_limit:
            raise DataError(
                f"stage_limit={format_bytes(self._stage_limit)} is less than the {format_bytes(size)} of {split}, "
                f"which is copied whole: raise it."
            )
        return stage(index, self._uri or str(self.root), self._stage)

    def _split_folders(self) -> tuple[str, ...]:
        """Returns the folders that contain class folders, the training split first."""
        folders = [p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")]
        splits = sorted(p.name for p in folders if any(entry.is_dir() for entry in p.iterdir()))
        return tuple(sorted(splits, key=lambda name: name != self._train)) or (_WHOLE,)

    def _open_index(self, split: str) -> DatasetIndex:
        if split not in self.splits:
            raise DataError(f"{self.root} has no split '{split}', it has {', '.join(self.splits)}: correct the name.")
        cache = self._cache / "index"
        if self._uri is not None or (self._manifest is not None and self._manifest.address is not None):
            return self._open_remote(split)
        if self._manifest is not None or split == self._train or self._train not in self.splits:
            return open_split(self.root, split, cache, self._max_pixels, self._class_list)
        warn = partial(warnings.warn, stacklevel=4)
        train, other = open_splits(
            str(self.root),
            self._train,
            split,
            cache,
            warn=warn,
            max_pixels=self._max_pixels,
            classes=self._class_list,
        )
        self._indexes[self._train] = train
        return other

    def _fetch_indexes(self, uri: str) -> Path:
        from pipeline.data.staging import fetch_indexes, remote_cache_folder

        if self._stage is None:
            raise DataError(f"{uri} is a URI: pass stage=FOLDER on this machine's local disk.")
        fetch_indexes(uri, (), self._cache / "index")
        return remote_cache_folder(uri, self._cache / "index")

    def _open_remote(self, split: str) -> DatasetIndex:
        from pipeline.data.staging import fetch_indexes, stage

        assert self._stage is not None and self._manifest is not None
        if self._uri is not None:
            (index,) = fetch_indexes(self._uri, (split,), self._cache / "index")
        else:
            index = open_index(self.root, self._manifest, split)
        check_sizes(index, self._max_pixels)
        if self._class_list is not None:
            index = with_classes(index, self._class_list, self._cache / "index")
        return index if self._stage_limit is not None else stage(index, self._uri or str(self.root), self._stage)


def _check_batch_size(batch_size: int, rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"rank={rank} must be from 0 to world_size - 1, and world_size is {world_size}.")
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"batch_size={batch_size} is the global batch size over all ranks: it must be a positive multiple of "
            f"world_size={world_size}."
        )


def _check_device(device: Device) -> None:
    if device not in ("cpu", "cuda"):
        raise UserError(f"device={device} is unknown: use cpu, or cuda for the current GPU (torch.cuda.set_device).")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("device=cuda: torch finds no GPU. Use cpu.")


def _steps(start: int, stop: int | None, epochs: float | None, num_samples: int, batch_size: int) -> int:
    """Returns the number of batches from `start` to the end."""
    if stop is not None and epochs is not None:
        raise UserError(f"stop={stop} and epochs={epochs} both set the end of the batches: use only one.")
    if epochs is not None:
        stop = round(epochs * num_samples)
    if stop is None:
        stop = (start // num_samples + 1) * num_samples
    if not 0 <= start <= stop:
        raise UserError(f"start={start} must be from 0 to the end of the batches, which is at {stop} samples.")
    return -(-(stop - start) // batch_size)
