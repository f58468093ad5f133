"""The `densenet` command. Each command's work is in a module of its own, imported when it is called."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launch.cli import configs, data, doctor, jobs, k8s, models, plan, report, runs, submit, sweep, train, ui
from launch.cli.common.options import MODEL, AsJson, RegistryUri, Uri
from launch.cli.common.output import console, errors, write_any_text
from launch.cli.common.tmpdir import short_tmpdir
from pipeline.errors import TrainingError, UserError
from pipeline.extras import extra
from pipeline.tracking.stores import given_stores

GROUPS = {
    "Data and plan": ("data", "configs", "plan"),
    "Train": ("train", "submit", "jobs", "sweep"),
    "Runs and models": ("runs", "report", "ui", "models", "eval", "predict", "export"),
    "Installation": ("doctor", "k8s"),
}
_EXIT_CODES = "0 done, 1 training failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM and 129 SIGHUP after a checkpoint"


class _Grouped(TyperGroup):
    """The commands by what they are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in GROUPS.items():
            limit = formatter.width - 6 - max(map(len, names))
            commands = {name: self.get_command(ctx, name) for name in names}
            with formatter.section(title):
                formatter.write_dl([(n, c.get_short_help_str(limit)) for n, c in commands.items() if c is not None])


app = typer.Typer(
    cls=_Grouped,
    epilog=f"Exit codes: {_EXIT_CODES}.",
    help="Train DenseNets on ImageNet: on one CPU, one GPU or many GPU nodes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (data, configs, plan, train, submit, jobs, sweep, runs, report, ui, models, doctor, k8s):
    app.add_typer(module.app)
log = logging.getLogger(__name__)


@app.callback()
def settings(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="print library logs, and what lies behind an error")
    ] = False,
) -> None:
    """Comes before every command."""
    if verbose:
        logging.basicConfig(level=logging.INFO)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help=MODEL)],
    images: Annotated[list[Path] | None, typer.Argument(help="image files")] = None,
    top: Annotated[int, typer.Option(min=1, help="classes to show")] = 5,
    batch: Annotated[Path | None, typer.Option(help="classify all files below a folder instead, with DALI")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for --batch")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    uri: Uri = None,
    registry_uri: RegistryUri = None,
    as_json: AsJson = False,
) -> None:
    """Classify images with a model.

    Example: densenet predict models:/densenet121@champion cat.jpg
    """
    from launch.cli.predict import predict_command

    stores = given_stores(uri, registry_uri)
    predict_command(console, model, images or [], top, batch, out, batch_size, stores, as_json)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL)],
    to: Annotated[str, typer.Option(help="onnx, torch (torch.export), timm (a hub-style folder) or int8 (ONNX)")],
    out: Annotated[Path, typer.Option(help="folder")],
    data: Annotated[Path | None, typer.Option(help="for int8: a data set to calibrate and measure with")] = None,
    split: Annotated[str, typer.Option(help="for int8: the split to measure on")] = "val",
    calibrate: Annotated[str, typer.Option(help="for int8: the split to take ranges from")] = "train",
    images: Annotated[int, typer.Option(min=1, help="for int8: pictures to take ranges from")] = 512,
    attach: Annotated[bool, typer.Option("--attach", help="store it with the model version")] = False,
    uri: Uri = None,
    registry_uri: RegistryUri = None,
) -> None:
    """Write a model for other programs.

    Its logits are compared with torch's first.

    Example: densenet export models:/densenet121@champion --to onnx --out exported
    """
    with extra("export"):
        from launch.cli.export import export_command

    stores = given_stores(uri, registry_uri)
    export_command(console, model, to, out, data, split, calibrate, images, attach, stores)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    data: Annotated[Path, typer.Option(help="a data set's folder, or a folder with class folders")],
    split: Annotated[str, typer.Option(help="of the data set")] = "val",
    crop: Annotated[int | None, typer.Option(min=8, max=1024, help="centre crop's side; default: the model's")] = None,
    resize: Annotated[int | None, typer.Option(min=8, max=2048, help="shorter side; default: by the crop")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bilinear or bicubic; default: the model's")] = None,
    tta: Annotated[str | None, typer.Option(help="flip or ten-crop: averaged views, as a second result")] = None,
    labels: Annotated[Path | None, typer.Option(help="JSON with the classes that count as right, as ReaL's")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for classes, confusion and predictions as CSV")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    uri: Uri = None,
    registry_uri: RegistryUri = None,
    as_json: AsJson = False,
) -> None:
    """Count a model's hits on a data set.

    Example: densenet eval models:/densenet121@champion --data /data/imagenet --tta flip
    """
    from launch.cli.evaluate import Options, eval_command

    options = Options(split, crop, resize, interpolation, tta, labels, out, batch_size)  # type: ignore[arg-type]
    eval_command(console, model, data, options, given_stores(uri, registry_uri), as_json)


def main() -> None:
    """Runs the command line; exit codes as its help lists them."""
    write_any_text(sys.stdout, sys.stderr)
    console.file = sys.stdout  # held on to: while Ray runs, what it prints to sys.stdout goes to a log file
    try:
        with short_tmpdir():
            app()
    except UserError as error:
        log.info("where the error comes from:", exc_info=True)
        errors.print(f"error: {error}", style="red")
        sys.exit(2)
    except TrainingError as error:
        log.info("where the error comes from:", exc_info=True)
        errors.print(f"training failed: {error}", style="red")
        sys.exit(1)
