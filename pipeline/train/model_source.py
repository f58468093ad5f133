"""Resolves a user's model argument: a weights file, a checkpoint, a run folder or a registered model."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.model.card import CARD
from pipeline.tracking.stores import Stores
from pipeline.train.checkpoint import best_checkpoint, checkpoint_root, checkpoints

MODEL_URI_SCHEMES = ("models:/", "runs:/")  # of models in the tracking store


def resolve_model(path_or_uri: str, key: str, cache: Path, stores: Stores) -> Path:
    """Returns a weights file, or a folder with a model card: a checkpoint, a run's best one, or a registered model.

    Args:
        path_or_uri: A path, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/NAME.
        key: The config key or argument that holds it, for error messages.
        cache: The folder into which a registered model is downloaded, once.
        stores: The tracking store and the model registry.

    Raises:
        UserError: there is no such model.
    """
    if path_or_uri.startswith(MODEL_URI_SCHEMES):
        from pipeline.tracking.registry import download

        return download(path_or_uri, stores, cache)
    path = Path(path_or_uri).expanduser()
    if path.is_file() or (path / CARD).is_file():
        return path
    if checkpoints(checkpoint_root(path)):
        return best_checkpoint(path)
    raise UserError(
        f"{key}={path_or_uri} is no model: give a checkpoint's or a run's folder, models:/NAME@ALIAS, "
        f"models:/NAME/VERSION, runs:/ID/NAME, or, where no classes are needed, a .safetensors or .pth file."
    )
