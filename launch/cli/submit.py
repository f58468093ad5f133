"""`densenet submit`: submits a training run as a Ray job."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.common.options import Config, Dashboard, Overrides, Wait
from launch.cli.common.output import console
from launch.cluster.ports import dashboard_address

if TYPE_CHECKING:
    from launch.cluster.jobs import JobSubmissionClient

app = typer.Typer()


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    address: Dashboard = None,
    no_env: Annotated[bool, typer.Option("--no-env", help="do not install the locked packages on the nodes")] = False,
    env: Annotated[
        list[str] | None, typer.Option(help="environment variable of the job, NAME=VALUE; repeatable")
    ] = None,
    secret: Annotated[
        list[str] | None, typer.Option(help="name of a variable that must be set on the nodes; repeatable")
    ] = None,
    wait: Wait = False,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the job's logs")] = False,
) -> None:
    """Submit a training run as a Ray job to a cluster.

    Sends the code and the config, follows the job's logs, and exits with its exit code.

    Example: densenet submit densenet121 data.root=/data/imagenet --address http://head:8265
    """
    dashboard = dashboard_address(address)
    from launch.cluster.submit import JobOptions, submit
    from launch.run.prepare import load_named_config

    named = load_named_config(config, overrides or [])
    client, job = submit(named, JobOptions(dashboard, not no_env, tuple(env or ()), tuple(secret or ()), wait))
    console.print(
        f"job {job} trains {named.run.name}; `densenet jobs logs {job} --follow` shows it, `densenet jobs stop {job}` "
        f"stops it"
    )
    if not detach:
        raise typer.Exit(_follow(client, job))


def _follow(client: "JobSubmissionClient", job: str) -> int:
    """Follows the job until its end; after Ctrl-C stops it if the user confirms, else lets it run."""
    from launch.cluster.jobs import follow_job, stop

    try:
        return follow_job(client, job)
    except KeyboardInterrupt:
        if sys.stdin.isatty() and console.input(f"\nstop {job}? [y/N] ", markup=False).strip().lower() in ("y", "yes"):
            stop(client, job, console.print)
            return 130
        console.print(
            f"{job} continues; `densenet jobs logs {job} --follow` shows it, `densenet jobs stop {job}` stops it"
        )
        return 130
