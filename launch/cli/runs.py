"""`densenet runs`: lists, shows and compares MLflow runs."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.cli.common.options import AsJson, Experiment, Uri
from launch.cli.common.output import console
from launch.cli.common.tables import print_table
from pipeline.tracking.stores import redacted, stores_from_options

app = typer.Typer(
    name="runs", help="List, show, compare and sync MLflow runs.", no_args_is_help=True, rich_markup_mode=None
)

_METRICS = (
    "val/top1",
    "val/top5",
    "val/loss",
    "val_ema/top1",
    "train/loss",
    "train/img_per_s",
    "restarts",
    "lost_samples",
)
_TAGS = ("restart.", "checkpoint.", "data.", "eval.", "machine.", "version.", "mlflow.source.git", "git.", "changed.")
_MAX_CHARACTERS = 40  # of a value in a comparison


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option(min=1, help="number of runs")] = 20,
    uri: Uri = None,
    experiment: Experiment = "densenet",
    as_json: AsJson = False,
) -> None:
    """List the newest runs.

    Example: densenet runs list --limit 5
    """
    from pipeline.tracking.queries import list_runs

    found = list_runs(_uri(uri), experiment)[:limit]
    if as_json:
        print(json.dumps([asdict(run) for run in found], indent=2))
        return
    rows = [
        (
            run.name,
            run.status,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started)),
            "" if run.minutes is None else f"{run.minutes:.1f}",
            run.params.get("model.name", ""),
            _number(run.metrics.get("train/epoch")),
            _number(run.metrics.get("val/top1")),
            run.id,
        )
        for run in found
    ]
    columns = ("run", "status", "started", "minutes", "model", "epochs", "top-1 %", "id")
    print_table(console, columns, rows)


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="run name or MLflow run id")],
    uri: Uri = None,
    experiment: Experiment = "densenet",
    as_json: AsJson = False,
) -> None:
    """Show a run's results, data, restarts and versions.

    Example: densenet runs show first
    """
    from pipeline.tracking.queries import find_run

    found = find_run(_uri(uri), experiment, run)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.started))
    rows: list[tuple[str, Any]] = [("run", found.name), ("id", found.id), ("status", found.status), ("started", began)]
    rows += [(key, _number(found.metrics[key])) for key in _METRICS if key in found.metrics]
    rows += [(key, value) for key, value in sorted(found.tags.items()) if key.startswith(_TAGS)]
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        console.print(f"{name:{width}}{value}", markup=False, soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="run names or MLflow run ids, two or more")],
    uri: Uri = None,
    experiment: Experiment = "densenet",
) -> None:
    """Show the differences of runs.

    Compares parameters and the last results.

    Example: densenet runs compare first second
    """
    from pipeline.tracking.queries import differences, find_run

    found = [find_run(_uri(uri), experiment, run) for run in runs]
    rows = [
        (key, *(_number(run.metrics.get(key)) for run in found))
        for key in _METRICS
        if any(key in run.metrics for run in found)
    ]
    rows += [(key, *(value[:_MAX_CHARACTERS] for value in values)) for key, values in differences(found)]
    print_table(console, ("", *(run.name for run in found)), rows)


@app.command()
def sync(
    folder: Annotated[Path, typer.Argument(help="run folder, for example outputs/RUN")],
    timeout: Annotated[float, typer.Option(min=0, help="seconds to wait for the store")] = 60,
) -> None:
    """Send a run's unsent records to its tracking store.

    Example: densenet runs sync outputs/first
    """
    from launch.run.register import send_records

    tracker = send_records(
        folder, timeout, console.print, lambda text: console.print(text, style="yellow", soft_wrap=True)
    )
    console.print(f"all records of {folder} are in {redacted(tracker.uri)}, run {tracker.run_id}", soft_wrap=True)


def _uri(option: str | None) -> str:
    return stores_from_options(option, None).tracking


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
