"""`densenet doctor`: tests the installation, and prints a fix for each failure."""

import os
import platform

import typer
from rich.text import Text

from launch.cli.common.output import console
from launch.cli.common.tables import print_table

app = typer.Typer()


@app.command()
def doctor() -> None:
    """Test each component of the installation.

    Prints versions and devices, and runs a short self-test of each component.

    Example: densenet doctor
    """
    from launch.run.doctor import run_checks

    console.print(
        f"Python {platform.python_version()} on {platform.platform()}, {len(os.sched_getaffinity(0))} CPU cores"
    )
    findings = list(run_checks())
    rows = [
        (f.name, f.version, Text(f.result, style="red" if f.fix else "green"), f"{f.seconds:.1f}") for f in findings
    ]
    print_table(console, ("component", "version", "result", "seconds"), rows, right=("seconds",))
    for finding in findings:
        if finding.fix:
            console.print(f"{finding.name}: {finding.fix}", style="yellow", soft_wrap=True)
    raise typer.Exit(1 if any(finding.fix for finding in findings) else 0)
