"""`densenet sweep`: several trainings with other values, the poor ones ended early."""

import shlex
from typing import Annotated, Any

import typer

from launch.cli.common.options import Address, Config, Overrides
from launch.cli.common.output import console, outlive_readers
from launch.cli.common.tables import print_table

app = typer.Typer()


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    space: Annotated[list[str] | None, typer.Option(help="KEY=log(LOW,HIGH), uniform(...) or choice(A,B)")] = None,
    trials: Annotated[int, typer.Option(min=1, help="trainings in all; poor ones are ended early")] = 8,
    address: Address = None,
) -> None:
    """Train with several values, and report the best.

    Example: densenet sweep demo --space 'optim.lr=log(0.01,1)' --trials 8
    """
    from launch.run import sweep

    outlive_readers(console)
    given = overrides or []
    found = sweep.sweep(
        config,
        given,
        space or [],
        trials,
        address,
        told=lambda text: console.print(text, soft_wrap=True),
        warn=lambda text: console.print(text, style="yellow"),
    )
    keys = sorted(found[0].values)
    columns = ("top-1 %", "epochs", *keys)
    rows = [(f"{t.top1:.2f}", f"{t.epoch:.1f}", *(_shown(t.values[key]) for key in keys)) for t in found]
    print_table(console, columns, rows, right=columns)
    best = [f"{key}={found[0].values[key]}" for key in keys]
    again = [text for text in given if not text.startswith("run.name=")]
    console.print(
        f"the best again: densenet train {shlex.join([str(config), *again, *best])}", soft_wrap=True, markup=False
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
