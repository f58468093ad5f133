"""`densenet models`: which models there are."""

import sys

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="DenseNets by name.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_models() -> None:
    """Show the models: parameters, multiply-adds, and the paper's accuracy."""
    from pipeline.model import ARCHITECTURES, PAPER, size

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for column in ("classes", "parameters", "G multiply-adds", "at pixels"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("paper, top-1 / top-5 %", no_wrap=True)
    for name, architecture in ARCHITECTURES.items():
        small = name == "densenet_tiny" or architecture.get("stem_type") == "cifar"
        classes, side = (10, 32) if small else (1000, 224)
        counted = size(name, classes, side)
        multiply_adds = f"{counted.multiply_adds / 1e9:.3f}"
        table.add_row(
            name, str(classes), f"{counted.parameters:,}", multiply_adds, str(side), PAPER.get(name, "not in the paper")
        )
    Console(file=sys.stdout, highlight=False, width=120).print(table)
