"""`densenet sweep`: searches hyperparameters, and stops poor trials early (ASHA)."""

import shlex
from typing import Annotated, Any

import typer

from launch.cli.common.options import Address, Config, Overrides
from launch.cli.common.output import console, ignore_closed_output
from launch.cli.common.tables import print_table

app = typer.Typer()


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    space: Annotated[
        list[str] | None, typer.Option(help="KEY=log(LOW,HIGH), KEY=uniform(LOW,HIGH) or KEY=choice(A,B)")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="number of training runs; poor ones stop early")] = 8,
    address: Address = None,
) -> None:
    """Search hyperparameters with several training runs.

    Example: densenet sweep demo --space 'optim.lr=log(0.01,1)' --trials 8
    """
    from launch.run import sweep

    ignore_closed_output(console)
    overrides = overrides or []
    ranked = sweep.sweep(
        config,
        overrides,
        space or [],
        trials,
        address,
        log=lambda text: console.print(text, soft_wrap=True),
        warn=lambda text: console.print(text, style="yellow"),
    )
    keys = sorted(ranked[0].values)
    columns = ("top-1 %", "epochs", *keys)
    rows = [(f"{t.top1:.2f}", f"{t.epoch:.1f}", *(_formatted(t.values[key]) for key in keys)) for t in ranked]
    print_table(console, columns, rows, right=columns)
    best = [f"{key}={ranked[0].values[key]}" for key in keys]
    fixed = [text for text in overrides if not text.startswith("run.name=")]
    command = f"densenet train {shlex.join([str(config), *fixed, *best])}"
    console.print(f"to train with the best values: {command}", soft_wrap=True, markup=False)


def _formatted(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
