"""Sets up a run before training: paths, data, derived values, pretrained weights, checks of the config."""

import datetime
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config_fields import Device, Location
from pipeline.data.class_subset import with_classes
from pipeline.data.dataset import check_classes, check_sizes, open_splits
from pipeline.data.generated import generate_data
from pipeline.data.index import DatasetIndex
from pipeline.data.shuffle_quality import shuffle_warning
from pipeline.data.staging import fetch_indexes, is_remote, require_stage
from pipeline.data.streaming.limits import check_limit, shard_bytes
from pipeline.derived import Derived, derive
from pipeline.errors import UserError
from pipeline.locations import is_uri, with_locations
from pipeline.model.card import ModelCard
from pipeline.model.pretrained import NO_PRETRAINED, Pretrained
from pipeline.train.deepspeed_schema import check_deepspeed
from pipeline.train.storage import StorageError, checkpoint_storage
from pipeline.train.warm_start import find_checkpoint, find_pretrained
from pipeline.unused_keys import unused_key_warnings


@dataclass(frozen=True)
class RunSetup:
    """A run that is ready to train.

    `initial_weights` describes where the initial weights come from; `resume` is another run's checkpoint to resume
    from, if any.
    """

    config: RunConfig
    derived: Derived
    train_index: DatasetIndex
    val_index: DatasetIndex
    pretrained: Pretrained
    initial_weights: str
    resume: Path | None
    warnings: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The run's folder, `run.output`/`run.name`."""
        return Path(self.config.run.output) / str(self.config.run.name)


def new_run_name(stem: str) -> str:
    """Returns a unique run name from a stem, the time and a random suffix."""
    return f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def with_absolute_paths(config: RunConfig, base: Path) -> RunConfig:
    """Makes the config's paths absolute; relative output paths are relative to `base`, others to the current folder."""

    def to_absolute(mark: Location, path: str) -> str:
        if is_uri(path) or mark.kind == "store":  # stores become absolute where they are opened
            return path
        return str((base if mark.kind == "output" else Path.cwd()) / Path(path).expanduser())

    return with_locations(config, to_absolute)


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
    """Opens the data, derives batch sizes and steps, and finds pretrained weights or the checkpoint to resume from.

    `resume` is None or `auto` for the run's own latest checkpoint, a path, or an MLflow run id. `embedded` is true
    where the run has this machine to itself. The result's warnings are `warnings` and those about the config.

    Raises:
        UserError: any error that would stop the run later and can be detected now.
    """
    output, all_warnings = Path(config.run.output), list(warnings)
    if config.data.root is not None:
        root = generate_data(config.data.root, output)
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": root})})
    train_index, val_index = _open_data(config, output / "index", all_warnings.append)
    require_stage(train_index.address, str(config.data.root), config.data.stage)
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
            f"data.shuffle=windowed shuffles within windows of shards, but data.root={config.data.root} holds class "
            f"folders, each with one class: use data.shuffle=full, or prepare shards."
        )
    check_limit(config.data, train_index, shard_bytes(val_index))
    if config.data.shuffle == "windowed":
        all_warnings += filter(None, [shuffle_warning(train_index, config.data.window)])
    check_deepspeed(config, derived)
    _check_storage(config)
    if config.engine.sync_batch_norm and derived.device == "cpu":
        raise UserError("engine.sync_batch_norm=true needs GPUs: omit it on the CPU.")
    pretrained = find_pretrained(config)
    initial_weights = _check_pretrained(config, derived, pretrained, train_index.classes)
    found = None if resume in (None, "auto") else find_checkpoint(str(resume), config)
    if found is not None:
        from pipeline.train.state import restore_state  # torch, timm and DALI take seconds to import

        restore_state(config, derived, train_index, found)
        initial_weights = f"{found}, with the optimizer state and progress of its run"
        if config.model.weights is not None:
            all_warnings.append(
                f"model.weights={config.model.weights} has no effect: --resume={resume} provides the weights"
            )
    all_warnings += unused_key_warnings(config, derived, embedded)
    all_warnings += _check_normalization(config, pretrained)
    return RunSetup(config, derived, train_index, val_index, pretrained, initial_weights, found, tuple(all_warnings))


def _check_pretrained(config: RunConfig, derived: Derived, pretrained: Pretrained, classes: tuple[str, ...]) -> str:
    """Loads the pretrained weights and the teacher once; returns a description of the initial weights."""
    description = f"random, from seed {config.run.seed}"
    if pretrained == NO_PRETRAINED:
        return description
    from pipeline.model.densenet import create  # torch and timm take seconds to import
    from pipeline.model.weights import load_teacher, load_weights

    if pretrained.weights is not None:
        loaded = load_weights(create(config.model, derived.num_classes), pretrained.weights)
        head = "" if loaded.head_loaded else f"; the classifier is new, for {derived.num_classes} classes, and random"
        description = f"{loaded.file}{head}"
    if pretrained.teacher is not None:
        load_teacher(pretrained.teacher, classes, config.model.in_chans)
    return description


def _check_storage(config: RunConfig) -> None:
    try:
        storage = checkpoint_storage(config)
        if storage is not None:
            storage.names()
            storage.check()
    except StorageError as error:
        raise UserError(f"{error}. Give a folder or a URI (s3://...) that this machine can read and write.") from error


def _check_normalization(config: RunConfig, pretrained: Pretrained) -> list[str]:
    """Returns warnings where the pretrained weights or the teacher were trained with another mean or std."""
    warnings = []
    for key, path in (("model.weights", pretrained.weights), ("loss.teacher", pretrained.teacher)):
        if path is not None and path.is_dir():
            transform = ModelCard.read(path).transform
            for name in ("mean", "std"):
                configured, trained_with = getattr(config.data, name), getattr(transform, name)
                if configured != trained_with:
                    warnings.append(f"data.{name} is {list(configured)}, {key} was trained with {list(trained_with)}")
    return warnings


def _open_data(config: RunConfig, cache: Path, warn: Callable[[str], None]) -> tuple[DatasetIndex, DatasetIndex]:
    data = config.data
    classes = None if data.classes is None else Path(data.classes)
    if data.root is not None and is_remote(data.root):
        train_index, val_index = fetch_indexes(data.root, (data.train, data.val), cache)
        if classes is not None:
            train_index, val_index = (with_classes(index, classes, cache) for index in (train_index, val_index))
        check_classes(train_index, val_index, (data.train, data.val), data.root, warn)
        for index in (train_index, val_index):
            check_sizes(index, data.max_pixels)
        return train_index, val_index
    skip_corrupt = data.on_corrupt == "skip"
    return open_splits(data.root, data.train, data.val, cache, skip_corrupt, warn, data.max_pixels, classes)


def check_writable(output: Path) -> None:
    """Creates the folder `output` if it is missing; raises `UserError` if no file can be written to it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(
            f"run.output={output} cannot be written: {error.strerror}. Set run.output to a writable folder."
        ) from error
