"""`densenet jobs`: lists, follows and stops Ray jobs."""

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

Job = Annotated[str, typer.Argument(help="job id from `densenet jobs list`")]


@app.command("list")
def list_jobs(address: Dashboard = None, as_json: AsJson = False) -> None:
    """List the jobs, newest first.

    Example: densenet jobs list --address http://head:8265
    """
    dashboard = dashboard_address(address)
    from launch.cluster import jobs

    found = jobs.list_jobs(dashboard)
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in found], indent=2))
        return
    rows = []
    for job in found:
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
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", help="until the job ends")] = False,
    address: Dashboard = None,
) -> None:
    """Print a job's logs.

    With --follow until its end, and with its exit code.

    Example: densenet jobs logs first --follow
    """
    dashboard = dashboard_address(address)
    from launch.cluster.jobs import print_logs

    raise typer.Exit(print_logs(dashboard, job, follow))


@app.command()
def stop(job: Job, address: Dashboard = None) -> None:
    """Stop a job; a training run writes a checkpoint first.

    Example: densenet jobs stop first
    """
    dashboard = dashboard_address(address)
    from launch.cluster.jobs import stop_job

    stop_job(dashboard, job, console.print)
