"""`densenet doctor`: does each part of the installation work, and what to do where it does not."""

import os
import platform

import typer
from rich.text import Text

from launch.cli.common.output import console
from launch.cli.common.tables import print_table

app = typer.Typer()


@app.command()
def doctor() -> None:
    """Test the installation.

    Versions, devices, and a second's work of each part.

    Example: densenet doctor
    """
    from launch.run.doctor import findings

    console.print(
        f"Python {platform.python_version()} on {platform.platform()}, {len(os.sched_getaffinity(0))} CPU cores"
    )
    found = list(findings())
    rows = [
        (part.name, part.version, Text(part.seen, style="red" if part.fix else "green"), f"{part.seconds:.1f}")
        for part in found
    ]
    print_table(console, ("part", "version", "result", "seconds"), rows, right=("seconds",))
    for part in found:
        if part.fix:
            console.print(f"{part.name}: {part.fix}", style="yellow", soft_wrap=True)
    raise typer.Exit(1 if any(part.fix for part in found) else 0)
