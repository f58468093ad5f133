"""`densenet train`."""

from typing import Annotated

import typer

from launch.cli.common.options import Address, Config, Overrides, Wait
from launch.cli.common.output import console, outlive_readers

app = typer.Typer()


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    resume: Annotated[
        str, typer.Option(help="auto: the run's own newest checkpoint; or a folder, or an MLflow run id")
    ] = "auto",
    wait: Wait = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print warnings and the summary alone")] = False,
) -> None:
    """Train, evaluate, and register the model.

    Example: densenet train densenet121 data.root=/data/imagenet
    """
    from launch.run.train import train_command

    outlive_readers(console)
    train_command(console, config, overrides or [], address, resume, wait, quiet)
