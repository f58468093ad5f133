"""`densenet submit`: a training as a Ray job."""

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
    where = dashboard_address(address)
    from launch.cluster.submit import JobOptions, submit
    from launch.run.prepare import named_config

    named = named_config(config, overrides or [])
    client, job = submit(named, JobOptions(where, not no_env, tuple(env or ()), tuple(secret or ()), wait))
    console.print(
        f"job {job} trains {named.run.name}; `densenet jobs logs {job} --follow` shows it, `jobs stop` ends it"
    )
    if not detach:
        raise typer.Exit(_follow(client, job))


def _follow(client: "JobSubmissionClient", job: str) -> int:
    """Follows the job to its end; Ctrl-C stops it, where the user says so, or leaves it to itself."""
    from launch.cluster.jobs import follow_job, stop

    try:
        return follow_job(client, job)
    except KeyboardInterrupt:
        if sys.stdin.isatty() and console.input(f"\nstop {job}? [y/N] ", markup=False).strip().lower() in ("y", "yes"):
            stop(client, job, console.print)
            return 130
        console.print(
            f"{job} goes on; `densenet jobs logs {job} --follow` shows it, `densenet jobs stop {job}` ends it"
        )
        return 130
