"""`densenet slurm`: renders a batch script for Slurm."""

import sys
from typing import Annotated

import typer

from launch.cli.common.options import Config, Overrides

app = typer.Typer(name="slurm", help="Render a batch script for Slurm.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Keeps the name `render`: typer runs an only command without its name."""


@app.command()
def render(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="number of nodes")] = 1,
    cpus_per_node: Annotated[
        int | None, typer.Option(help="CPU cores on each node; default: whole nodes", show_default=False)
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs on each node")] = 0,
    time: Annotated[str | None, typer.Option(help="time limit, for example 24:00:00; the job is then requeued")] = None,
    partition: Annotated[str | None, typer.Option(help="partition; default: the site's")] = None,
    account: Annotated[str | None, typer.Option(help="account; default: the user's")] = None,
    grace: Annotated[int, typer.Option(help="seconds before the time limit for the last checkpoint")] = 120,
) -> None:
    """Print a batch script that starts Ray on the nodes of a job, and trains.

    Submit it with sbatch, whose options override those in the script.

    Example: densenet slurm render densenet121 run.name=first --nodes 4 --gpus-per-node 8 --time 24:00:00
    """
    from launch.slurm.script import SlurmOptions, render

    options = SlurmOptions(nodes, cpus_per_node, gpus_per_node, time, partition, account, grace)
    sys.stdout.write(render(config, overrides or [], options))
