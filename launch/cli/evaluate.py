"""`densenet eval`: evaluates a model on a split."""

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.common.options import AsJson, Classes, Model, RegistryUri, Uri
from launch.cli.common.output import console
from pipeline.tracking.stores import stores_from_options

app = typer.Typer()


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="data set folder, or a folder with class folders")],
    split: Annotated[str, typer.Option(help="split of the data set")] = "val",
    crop: Annotated[
        int | None, typer.Option(min=8, max=1024, help="center crop side, pixels; default: the model's")
    ] = None,
    resize: Annotated[
        int | None, typer.Option(min=8, max=2048, help="shorter side, pixels; default: from the crop")
    ] = None,
    interpolation: Annotated[str | None, typer.Option(help="bilinear or bicubic; default: the model's")] = None,
    tta: Annotated[
        str | None, typer.Option(help="test-time augmentation, as a second result: flip or ten-crop")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="JSON with each image's correct classes, such as ReaL labels")
    ] = None,
    classes: Classes = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for CSV files: classes, confusion matrix, predictions")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images per batch")] = 64,
    uri: Uri = None,
    registry_uri: RegistryUri = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model on a data set: top-1, top-5, loss.

    Example: densenet eval models:/densenet121@champion --data /data/imagenet --tta flip
    """
    from launch.cli.common.eval_report import Options, eval_command

    options = Options(split, crop, resize, interpolation, tta, labels, classes, out, batch_size)  # type: ignore[arg-type]
    eval_command(console, model, data, options, stores_from_options(uri, registry_uri), as_json)
