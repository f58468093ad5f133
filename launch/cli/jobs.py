"""`densenet jobs`: what runs on a cluster."""

import json
import time
from typing import Annotated

import typer

from launch.cli.common.options import AsJson, Dashboard
from launch.cli.common.output import console
from launch.cli.common.tables import print_table
from launch.cluster.ports import dashboard_address

app = typer.Typer(
    name="jobs", help="List, follow and stop the jobs of a Ray cluster.", no_args_is_help=True, rich_markup_mode=None
)

Job = Annotated[str, typer.Argument(help="as `densenet jobs list` shows it")]


@app.command("list")
def list_jobs(address: Dashboard = None, as_json: AsJson = False) -> None:
    """Show the jobs, newest first.

    Example: densenet jobs list --address http://head:8265
    """
    where = dashboard_address(address)
    from launch.cluster.jobs import submitted

    jobs = submitted(where)
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in jobs], indent=2))
        return
    rows = []
    for job in jobs:
        began = (job.start_time or 0) / 1000
        ended = (job.end_time or time.time() * 1000) / 1000
        rows.append(
            (
                str(job.submission_id),
                (job.metadata or {}).get("run", ""),
                str(job.status.value),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(began)),
                f"{(ended - began) / 60:.0f}",
            )
        )
    print_table(console, ("job", "run", "status", "started", "minutes"), rows)


@app.command()
def logs(
    job: Job, follow: Annotated[bool, typer.Option("--follow", help="to its end")] = False, address: Dashboard = None
) -> None:
    """Show a job's output.

    With --follow to its end, and exit as it did.

    Example: densenet jobs logs first --follow
    """
    where = dashboard_address(address)
    from launch.cluster.jobs import print_logs

    raise typer.Exit(print_logs(where, job, follow))


@app.command()
def stop(job: Job, address: Dashboard = None) -> None:
    """End a job; a training writes a checkpoint first.

    Example: densenet jobs stop first
    """
    where = dashboard_address(address)
    from launch.cluster.jobs import stop_job

    stop_job(where, job, console.print)
