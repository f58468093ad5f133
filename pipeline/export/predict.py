"""Predictions by a registered model."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from PIL import Image

from pipeline.errors import UserError
from pipeline.tracking.registry import resolve
from pipeline.tracking.store import shown


@dataclass(frozen=True)
class Prediction:
    """An image's most probable classes with their probabilities in [0, 1], best first."""

    path: Path
    classes: list[tuple[str, float]]


def predict_files(model_uri: str, uri: str, images: Sequence[Path], top: int = 5) -> list[Prediction]:
    """Classifies image files with the model `models:/NAME@ALIAS` or `models:/NAME/VERSION` of the registry at `uri`.

    Raises:
        UserError: there is no such model, it does not load, or a file is missing or is not an image.
    """
    contents = [_content(path) for path in images]
    resolved = resolve(model_uri, uri)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's notes on versions; the pinned ones are in the model
            mlflow.set_tracking_uri(uri)
            model = mlflow.pyfunc.load_model(resolved.uri, suppress_warnings=True)
            frame = model.predict(pd.DataFrame({"image": contents}))
    except (MlflowException, OSError) as error:
        raise UserError(f"{model_uri} ({resolved.uri} in {shown(uri)}) cannot be used: {error}") from error
    names = model.unwrap_python_model().classes
    return [
        Prediction(path, sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])[:top])
        for path, row in zip(images, frame["probabilities"], strict=True)
    ]


def _content(path: Path) -> bytes:
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give image files.")
    try:
        with Image.open(path) as image:
            image.load()
        return path.read_bytes()
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} is not an image that can be read: {error}.") from error
