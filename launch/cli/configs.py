"""`densenet configs`: lists, prints and copies the built-in configs."""

import re
import sys
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError

app = typer.Typer(
    name="configs", help="List, show and copy the built-in configs.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(help="name from `densenet configs list`")]


@app.command("list")
def list_configs() -> None:
    """List the built-in configs and recipes.

    Example: densenet configs list
    """
    from pipeline.config_file import built_in_configs

    configs = built_in_configs()
    width = max(map(len, configs)) + 2
    for name, file in configs.items():
        print(f"{name:{width}}{_summary(file)}")


def _summary(file: Path) -> str:
    """Returns the first clause of a config's leading comment."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return re.split(r": |\. |\.$", " ".join(line.removeprefix("# ") for line in lines), maxsplit=1)[0]


@app.command()
def show(name: Name) -> None:
    """Print a built-in config file.

    Example: densenet configs show densenet121
    """
    from pipeline.config_file import find_config

    sys.stdout.write(find_config(name).read_text(encoding="utf-8"))


@app.command()
def copy(
    name: Name, folder: Annotated[Path, typer.Argument(help="target folder, created if missing")] = Path()
) -> None:
    """Copy a built-in config and its recipes, to edit them.

    Example: densenet configs copy densenet121 my-configs
    """
    from pipeline.config_file import BUILT_IN, find_config, included_files

    root = BUILT_IN.resolve()
    copies = {file: folder / file.relative_to(root) for file in included_files(find_config(name))}
    existing = [str(file) for file in copies.values() if file.exists()]
    if existing:
        raise UserError(f"{', '.join(existing)} exists: remove it, or copy to another folder.")
    try:
        for source, target in copies.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            print(target)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}.") from error
