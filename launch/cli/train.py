"""`densenet train`: trains, evaluates and registers a model."""

from typing import Annotated

import typer

from launch.cli.common.options import Address, Config, Overrides, Wait
from launch.cli.common.output import console, ignore_closed_output

app = typer.Typer()


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: the run's latest checkpoint; else a checkpoint or run folder, or an MLflow run id"),
    ] = "auto",
    wait: Wait = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print only warnings and the summary")] = False,
) -> None:
    """Train, evaluate, and register the model.

    Example: densenet train densenet121 data.root=/data/imagenet
    """
    from launch.run.train import train_command

    ignore_closed_output(console)
    train_command(console, config, overrides or [], address, resume, wait, quiet)
