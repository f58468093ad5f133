"""Where the models that a user names are: files of weights, checkpoints, runs, the model registry."""

import re
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.model.sources import NO_SOURCES, Sources
from pipeline.tracking.stores import Stores, stores_of
from pipeline.train.checkpoint import MANIFEST, best_checkpoint, checkpoint_root, checkpoints, fault, newest_valid

ADDRESSES = ("models:/", "runs:/")  # of models in the tracking store
_RUN_ID = re.compile("[0-9a-f]{32}")


def find_sources(config: RunConfig) -> Sources:
    """The weights to start from and the teacher; registered models are kept in `run.output/models`.

    Raises:
        UserError: there is no such file, folder or registered model.
    """
    if config.model.weights is None and config.loss.teacher is None:
        return NO_SOURCES
    cache, stores = Path(config.run.output) / "models", stores_of(config)
    weights, teacher = (
        None if place is None else locate(place, key, cache, stores)
        for key, place in (("model.weights", config.model.weights), ("loss.teacher", config.loss.teacher))
    )
    return Sources(weights, teacher)


def find_checkpoint(place: str, config: RunConfig) -> Path:
    """The checkpoint to go on from: a folder, the newest sound one of a run's folder, or that of an MLflow run's id.

    Raises:
        UserError: there is none, it is damaged, or the run has checkpoints of its own.
    """
    own = Path(config.run.output) / str(config.run.name)
    if checkpoints(checkpoint_root(own)):
        raise UserError(
            f"--resume={place}: the run {config.run.name} has checkpoints of its own, and goes on from the newest. "
            f"Leave --resume out, or choose another run.name."
        )
    path = Path(place).expanduser()
    if _RUN_ID.fullmatch(place) and not path.exists():
        from pipeline.tracking.look import run_folder  # MLflow takes seconds to import

        path = run_folder(place, stores_of(config).tracking)
    if (path / MANIFEST).is_file():
        reason = fault(path)
        if reason is not None:
            raise UserError(f"--resume={place} is damaged: {reason}.")
        return path
    skipped: list[str] = []
    found = newest_valid(checkpoint_root(path), skipped.append)
    if found is None:
        told = f" ({'; '.join(skipped)})" if skipped else ""
        raise UserError(f"--resume={place}: there is no sound checkpoint in {path}{told}.")
    return found


def model_folder(place: str, stores: Stores) -> Path:
    """The folder, with a card, of the model that a command was given.

    Raises:
        UserError: there is no such model, or it is a file of weights alone.
    """
    folder = locate(place, "MODEL", Path("outputs").absolute() / "models", stores)
    if folder.is_file():
        raise UserError(f"{folder} is a file of weights alone, without classes and transform: give its folder.")
    return folder


def locate(place: str, key: str, cache: Path, stores: Stores) -> Path:
    """A file of weights, or a folder with a model card: a checkpoint, a run's best one, or a registered model's.

    Args:
        place: What the user gave: a path, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/NAME.
        key: What the user calls it, for errors.
        cache: Where a registered model is downloaded to, once.
        stores: Where runs and registered models are.
    """
    if place.startswith(ADDRESSES):
        from pipeline.tracking.registry import download

        return download(place, stores, cache)
    path = Path(place).expanduser()
    if path.is_file() or (path / "model.json").is_file():
        return path
    if checkpoints(checkpoint_root(path)):
        return best_checkpoint(path)
    raise UserError(
        f"{key}={place} is no model: give a checkpoint's or a run's folder, models:/NAME@ALIAS, models:/NAME/VERSION, "
        f"runs:/ID/NAME, or, where no classes are needed, a .safetensors or .pth file."
    )
