"""What is settled before a training starts: places, data, derived values, what it starts from."""

import datetime
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Device, Location, RunConfig
from pipeline.data.dataset import check_classes, check_sizes, open_splits
from pipeline.data.generated import generate_data
from pipeline.data.index import DatasetIndex
from pipeline.data.staging import fetch_indexes, is_remote
from pipeline.derived import Derived, derive
from pipeline.errors import UserError
from pipeline.locations import is_uri, with_locations
from pipeline.model.card import ModelCard
from pipeline.model.pretrained import NO_PRETRAINED, Pretrained
from pipeline.train.deepspeed_schema import check_deepspeed
from pipeline.train.start import find_checkpoint, find_sources
from pipeline.train.storage import StorageError, storage_of
from pipeline.unused_keys import unused_key_warnings


@dataclass(frozen=True)
class RunSetup:
    """A training that is ready to start.

    `start` tells what its weights are at first; `resume` is another run's checkpoint to go on from, if any.
    """

    config: RunConfig
    derived: Derived
    train_index: DatasetIndex
    val_index: DatasetIndex
    sources: Pretrained
    start: str
    resume: Path | None
    warnings: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The run's folder, `run.output`/`run.name`."""
        return Path(self.config.run.output) / str(self.config.run.name)


def new_name(stem: str) -> str:
    """A name for a run that no other start gets, be it in the same second."""
    return f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def absolute(config: RunConfig, base: Path) -> RunConfig:
    """The config with its paths absolute on this machine; relative ones of what the run writes begin at `base`."""

    def of_this_machine(mark: Location, place: str) -> str:
        if is_uri(place) or mark.kind == "store":  # these are made absolute where they are opened
            return place
        return str((base if mark.kind == "output" else Path.cwd()) / Path(place).expanduser())

    return with_locations(config, of_this_machine)


def set_up(
    config: RunConfig,
    *,
    device: Device,
    workers: int,
    cpus_per_worker: int,
    embedded: bool,
    resume: str | None = None,
    warnings: Sequence[str] = (),
) -> RunSetup:
    """Opens the data, splits the work and finds what it starts from.

    `resume` is None or `auto` for the run's own newest checkpoint, a path, or an MLflow run id; `embedded` says that
    the run is alone on this machine. To the `warnings` are added those of what the user may not have meant.

    Raises:
        UserError: anything that would stop the run later and can be known now.
    """
    output, told = Path(config.run.output), list(warnings)
    if config.data.root is not None:
        root = generate_data(config.data.root, output)
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": root})})
    train_index, val_index = _open_data(config, output / "index", told.append)
    derived = derive(
        config,
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        device=device,
        train_samples=len(train_index),
        val_samples=len(val_index),
        num_classes=len(train_index.classes),
    )
    if config.data.shuffle == "windowed" and not train_index.shards:
        raise UserError(
            f"data.shuffle=windowed mixes within windows of shards, but data.root={config.data.root} holds class "
            f"folders, each a class of its own: use data.shuffle=full, or prepare shards."
        )
    check_deepspeed(config, derived)
    _check_storage(config)
    if config.engine.sync_batch_norm and derived.device == "cpu":
        raise UserError("engine.sync_batch_norm=true needs GPUs: leave it out on the CPU.")
    sources = find_sources(config)
    start = _check_sources(config, derived, sources, train_index.classes)
    found = None if resume in (None, "auto") else find_checkpoint(str(resume), config)
    if found is not None:
        from pipeline.train.state import resumed  # torch, timm and DALI take seconds to import

        resumed(config, derived, train_index, found)
        start = f"those of {found}, and all else of its run"
        if config.model.weights is not None:
            told.append(f"model.weights={config.model.weights} has no effect: --resume={resume} has the weights")
    told += unused_key_warnings(config, derived, embedded)
    told += _other_normalization(config, sources)
    return RunSetup(config, derived, train_index, val_index, sources, start, found, tuple(told))


def _check_sources(config: RunConfig, derived: Derived, sources: Pretrained, classes: tuple[str, ...]) -> str:
    """Tries the weights and the teacher on the model and the data, and says what the run starts from."""
    start = f"random, from seed {config.run.seed}"
    if sources == NO_PRETRAINED:
        return start
    from pipeline.model.densenet import create  # torch and timm take seconds to import
    from pipeline.model.weights import load_teacher, load_weights

    if sources.weights is not None:
        loaded = load_weights(create(config.model, derived.num_classes), sources.weights)
        head = "" if loaded.head_loaded else f"; the classifier is new, for {derived.num_classes} classes, and random"
        start = f"{loaded.file}{head}"
    if sources.teacher is not None:
        load_teacher(sources.teacher, classes, config.model.in_chans)
    return start


def _check_storage(config: RunConfig) -> None:
    try:
        storage = storage_of(config)
        if storage is not None:
            storage.names()
            storage.check()
    except StorageError as error:
        raise UserError(f"{error}. Give a folder or an address that this machine can read and write.") from error


def _other_normalization(config: RunConfig, sources: Pretrained) -> list[str]:
    """A warning where a model that is started or learned from was trained on images of another mean or deviation."""
    warnings = []
    for key, place in (("model.weights", sources.weights), ("loss.teacher", sources.teacher)):
        if place is not None and place.is_dir():
            theirs = ModelCard.read(place).transform
            for name in ("mean", "std"):
                ours, given = getattr(config.data, name), getattr(theirs, name)
                if ours != given:
                    warnings.append(f"data.{name} is {list(ours)}, {key} was trained with {list(given)}")
    return warnings


def _open_data(config: RunConfig, cache: Path, warn: Callable[[str], None]) -> tuple[DatasetIndex, DatasetIndex]:
    data = config.data
    if data.root is not None and is_remote(data.root):
        train_index, val_index = fetch_indexes(data.root, (data.train, data.val), cache)
        check_classes(train_index, val_index, (data.train, data.val), data.root, warn)
        for index in (train_index, val_index):
            check_sizes(index, data.max_pixels)
        return train_index, val_index
    skip_corrupt = data.on_corrupt == "skip"
    return open_splits(data.root, data.train, data.val, cache, skip_corrupt, warn, data.max_pixels)


def check_writable(output: Path) -> None:
    """Raises `UserError` when no file can be written in `output`, which is made if it is missing."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(
            f"run.output={output} cannot be written: {error.strerror}. Set run.output to a folder that can."
        ) from error
