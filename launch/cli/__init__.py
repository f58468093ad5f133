"""The `densenet` command. Each command's work is in a module of its own, imported when it is called."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from launch.cli import configs, data, jobs, k8s, models, runs
from launch.cli.common.output import write_any_text
from launch.cli.common.tmpdir import short_tmpdir
from launch.cli.runs import AsJson, RegistryUri, Uri
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
app.add_typer(data.app, name="data")
app.add_typer(configs.app, name="configs")
app.add_typer(models.app, name="models")
app.add_typer(jobs.app, name="jobs")
app.add_typer(runs.app, name="runs")
app.add_typer(k8s.app, name="k8s")
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
log = logging.getLogger(__name__)

Config = Annotated[
    Path, typer.Argument(help="YAML file, or a built-in config's name, for example demo", show_default=False)
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example train.epochs=2")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join; default: RAY_ADDRESS, else a Ray of its own")]
Resume = Annotated[str, typer.Option(help="auto: the run's own newest checkpoint; or a folder, or an MLflow run id")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print warnings and the summary alone")]
Wait = Annotated[bool, typer.Option("--wait", help="wait until the cluster has room for the workers")]
MODEL = "checkpoint or run folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/NAME"


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
def train(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    resume: Resume = "auto",
    wait: Wait = False,
    quiet: Quiet = False,
) -> None:
    """Train, evaluate, and register the model.

    Example: densenet train densenet121 data.root=/data/imagenet
    """
    from launch.run.train import train_command

    train_command(console, config, overrides or [], address, resume, wait, quiet)


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    address: jobs.Dashboard = None,
    no_env: Annotated[bool, typer.Option("--no-env", help="the nodes have the environment: install nothing")] = False,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the job; repeatable")] = None,
    secret: Annotated[list[str] | None, typer.Option(help="NAME that must be set on the nodes; repeatable")] = None,
    wait: Wait = False,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the job")] = False,
) -> None:
    """Train as a Ray job on a cluster.

    Sends the code and the config, follows the output, exits as the job does.

    Example: densenet submit densenet121 data.root=/data/imagenet --address http://head:8265
    """
    where = jobs.dashboard(address)
    from launch.cluster.submit import Options, submit_command

    options = Options(where, not no_env, tuple(env or ()), tuple(secret or ()), wait, not detach)
    raise typer.Exit(submit_command(console, config, overrides or [], options))


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    space: Annotated[list[str] | None, typer.Option(help="KEY=log(LOW,HIGH), uniform(...) or choice(A,B)")] = None,
    trials: Annotated[int, typer.Option(min=1, help="trainings in all; poor ones are ended early")] = 8,
    address: Address = None,
) -> None:
    """Train with several values, and report the best.

    Example: densenet sweep demo --space 'optim.lr=log(0.01,1)' --trials 8
    """
    from launch.run.sweep import sweep_command

    sweep_command(console, config, overrides or [], space or [], trials, address)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    cluster: Annotated[str | None, typer.Option(help="estimate ImageNet on NODESxGPUSxTYPE, as 8x8xH100")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the config and all that follows from it.

    Example: densenet plan densenet121 data.root=/data/imagenet
    """
    from launch.run.plan import plan_command

    plan_command(console, config, overrides or [], address, cluster, as_json)


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


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="names or ids of runs")],
    out: Annotated[Path, typer.Option(help="HTML file")] = Path("report.html"),
    uri: Uri = None,
    experiment: Annotated[str, typer.Option(help="MLflow experiment")] = "densenet",
) -> None:
    """Write runs as one HTML page.

    It has curves, differences, checkpoints and sample predictions.

    Example: densenet report first second --out report.html
    """
    from launch.run.runs_page import report_command

    report_command(console, runs, out, uri, experiment)


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000, uri: Uri = None, registry_uri: RegistryUri = None
) -> None:
    """Open the MLflow UI on this machine.

    Example: densenet ui --port 5000
    """
    from launch.run.ui import ui_command

    ui_command(console, port, given_stores(uri, registry_uri))


@app.command()
def doctor() -> None:
    """Test the installation.

    Versions, devices, and a second's work of each part.

    Example: densenet doctor
    """
    from launch.run.doctor import doctor_command

    raise typer.Exit(doctor_command(console))


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
