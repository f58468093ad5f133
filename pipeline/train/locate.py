"""Where the models are that a user names: files of weights, checkpoints, runs, the model registry."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.model.card import CARD
from pipeline.tracking.stores import Stores
from pipeline.train.checkpoint import best_checkpoint, checkpoint_root, checkpoints

ADDRESSES = ("models:/", "runs:/")  # of models in the tracking store


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
    if path.is_file() or (path / CARD).is_file():
        return path
    if checkpoints(checkpoint_root(path)):
        return best_checkpoint(path)
    raise UserError(
        f"{key}={place} is no model: give a checkpoint's or a run's folder, models:/NAME@ALIAS, models:/NAME/VERSION, "
        f"runs:/ID/NAME, or, where no classes are needed, a .safetensors or .pth file."
    )
