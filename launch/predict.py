"""`densenet predict`: the classes of images by a registered model."""

from pathlib import Path

from rich.console import Console

from pipeline.export.predict import predict_files
from pipeline.tracking.store import default_tracking_uri


def predict_command(console: Console, model: str, images: list[Path], top: int, uri: str | None) -> None:
    """Prints each image's most probable classes with their probabilities."""
    for prediction in predict_files(model, uri or default_tracking_uri(), images, top):
        console.print(str(prediction.path), markup=False, soft_wrap=True)
        for name, probability in prediction.classes:
            console.print(f"  {probability:8.2%}  {name}", markup=False, soft_wrap=True)
