"""`densenet predict`: classifies images."""

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.common.options import AsJson, Model, RegistryUri, Uri
from launch.cli.common.output import console
from pipeline.tracking.stores import stores_from_options

app = typer.Typer()


@app.command()
def predict(
    model: Model,
    images: Annotated[list[Path] | None, typer.Argument(help="image files")] = None,
    top: Annotated[int, typer.Option(min=1, help="number of classes per image")] = 5,
    batch: Annotated[Path | None, typer.Option(help="folder: classify all images below it, with DALI")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for the predictions of --batch")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images per batch, for --batch")] = 64,
    uri: Uri = None,
    registry_uri: RegistryUri = None,
    as_json: AsJson = False,
) -> None:
    """Classify images with a model.

    Example: densenet predict models:/densenet121@champion cat.jpg
    """
    from launch.cli.common.predictions import predict_command

    stores = stores_from_options(uri, registry_uri)
    predict_command(console, model, images or [], top, batch, out, batch_size, stores, as_json)
