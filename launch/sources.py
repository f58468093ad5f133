"""Where the models that a user names are: files of weights, checkpoints, runs, the model registry."""

from pathlib import Path

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.model.weights import Sources
from pipeline.tracking.registry import download
from pipeline.tracking.run import tracking_uri
from pipeline.train.checkpoint import checkpoints
from pipeline.train.state import best_checkpoint, checkpoint_root

REGISTRY = "models:/"


def find_sources(config: RunConfig) -> Sources:
    """The weights to start from and the teacher; registered models are kept in `run.output/models`.

    Raises:
        UserError: there is no such file, folder or registered model.
    """
    cache, uri = Path(config.run.output) / "models", tracking_uri(config)
    weights, teacher = (
        None if place is None else locate(place, key, cache, uri)
        for key, place in (("model.weights", config.model.weights), ("loss.teacher", config.loss.teacher))
    )
    return Sources(weights, teacher)


def locate(place: str, key: str, cache: Path, uri: str) -> Path:
    """A file of weights, or a folder with a model card: a checkpoint, a run's best one, or a registered model's.

    Args:
        place: What the user gave: a path, models:/NAME@ALIAS or models:/NAME/VERSION.
        key: What the user calls it, for errors.
        cache: Where a registered model is downloaded to, once.
        uri: The registry.
    """
    if place.startswith(REGISTRY):
        return download(place, uri, cache)
    path = Path(place).expanduser()
    if path.is_file() or (path / "model.json").is_file():
        return path
    if checkpoints(checkpoint_root(path)):
        return best_checkpoint(path)
    raise UserError(
        f"{key}={place} is no model: give a checkpoint's or a run's folder, models:/NAME@ALIAS, or, where no classes "
        f"are needed, a .safetensors or .pth file."
    )
