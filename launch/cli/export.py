"""`densenet export`: exports a model to ONNX, torch.export or timm, or quantizes it to int8."""

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
    to: Annotated[
        str, typer.Option(help="format: onnx, torch (torch.export), timm (a hub-style folder) or int8 (ONNX)")
    ],
    out: Annotated[Path, typer.Option(help="output folder")],
    data: Annotated[Path | None, typer.Option(help="int8: data set for calibration and accuracy")] = None,
    split: Annotated[str, typer.Option(help="int8: split for accuracy")] = "val",
    calibrate: Annotated[str, typer.Option(help="int8: split for calibration")] = "train",
    images: Annotated[int, typer.Option(min=1, help="int8: number of calibration images")] = 512,
    attach: Annotated[bool, typer.Option("--attach", help="upload the export to the model version")] = False,
    uri: Uri = None,
    registry_uri: RegistryUri = None,
) -> None:
    """Export a model to ONNX, torch.export, timm or int8.

    Compares the exported model's logits with PyTorch's first.

    Example: densenet export models:/densenet121@champion --to onnx --out exported
    """
    from launch.cli.common.export_report import export_command

    with requires_extra("export"):  # before anything is downloaded
        import pipeline.export.formats  # noqa: F401

    stores = stores_from_options(uri, registry_uri)
    export_command(console, model, to, out, data, split, calibrate, images, attach, stores)
