"""`densenet export`: a model as ONNX, torch.export, a timm folder, or quantized to int8."""

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.common.options import Model, RegistryUri, Uri
from launch.cli.common.output import console
from pipeline.extras import requires_extra
from pipeline.tracking.stores import stores_from_options

app = typer.Typer()


@app.command()
def export(
    model: Model,
    to: Annotated[str, typer.Option(help="onnx, torch (torch.export), timm (a hub-style folder) or int8 (ONNX)")],
    out: Annotated[Path, typer.Option(help="folder")],
    data: Annotated[Path | None, typer.Option(help="for int8: a data set to calibrate and measure with")] = None,
    split: Annotated[str, typer.Option(help="for int8: the split to measure on")] = "val",
    calibrate: Annotated[str, typer.Option(help="for int8: the split to take ranges from")] = "train",
    images: Annotated[int, typer.Option(min=1, help="for int8: images to take ranges from")] = 512,
    attach: Annotated[bool, typer.Option("--attach", help="store it with the model version")] = False,
    uri: Uri = None,
    registry_uri: RegistryUri = None,
) -> None:
    """Write a model for other programs.

    Its logits are compared with torch's first.

    Example: densenet export models:/densenet121@champion --to onnx --out exported
    """
    from launch.cli.common.export_report import export_command

    with requires_extra("export"):  # before anything is downloaded
        import pipeline.export.formats  # noqa: F401

    stores = stores_from_options(uri, registry_uri)
    export_command(console, model, to, out, data, split, calibrate, images, attach, stores)
