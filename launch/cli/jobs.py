"""`densenet jobs`: what runs on a cluster."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launch.cli.runs import AsJson

app = typer.Typer(help="List, follow and stop the jobs of a Ray cluster.", no_args_is_help=True)
console = Console(highlight=False)

_TOKENS = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
DEFAULT = "http://127.0.0.1:8265"
Dashboard = Annotated[
    str | None, typer.Option("--address", help=f"the dashboard; default: RAY_API_SERVER_ADDRESS, else {DEFAULT}")
]
Job = Annotated[str, typer.Argument(help="as `densenet jobs list` shows it")]


def dashboard(address: str | None) -> str:
    """The dashboard's address; also makes Ray use a token where there is one, which it looks at on import."""
    if os.environ.keys() & _TOKENS or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT


@app.command("list")
def list_jobs(address: Dashboard = None, as_json: AsJson = False) -> None:
    """Show the jobs, newest first.

    Example: densenet jobs list --address http://head:8265
    """
    where = dashboard(address)
    from launch.cluster.jobs import list_command

    list_command(console, where, as_json)


@app.command()
def logs(
    job: Job, follow: Annotated[bool, typer.Option("--follow", help="to its end")] = False, address: Dashboard = None
) -> None:
    """Show a job's output.

    With --follow to its end, and exit as it did.

    Example: densenet jobs logs first --follow
    """
    where = dashboard(address)
    from launch.cluster.jobs import logs_command

    raise typer.Exit(logs_command(where, job, follow))


@app.command()
def stop(job: Job, address: Dashboard = None) -> None:
    """End a job; a training writes a checkpoint first.

    Example: densenet jobs stop first
    """
    where = dashboard(address)
    from launch.cluster.jobs import stop_command

    stop_command(console, where, job)
