"""`densenet report`: writes a report of runs as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.common.options import Experiment, Uri
from launch.cli.common.output import console
from pipeline.tracking.stores import stores_from_options

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="run names or MLflow run ids")],
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
    uri: Uri = None,
    experiment: Experiment = "densenet",
) -> None:
    """Write a report of runs as one HTML page.

    It has curves, differences, checkpoints and sample predictions.

    Example: densenet report first second --out report.html
    """
    from launch.run.runs_page import write_page

    size = write_page(runs, out, stores_from_options(uri, None).tracking, experiment)
    console.print(f"{out}: {len(runs)} runs, {size / 1e6:.1f} MB", soft_wrap=True)
