"""The `densenet` command.

Each module of this package has an `app`: a named group of commands, or one command. A command parses its arguments,
calls `launch.run`, `launch.kubernetes`, `launch.cluster` or the library, and prints the result. It imports slow
packages when it runs.
"""

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launch.cli import (
    configs,
    data,
    doctor,
    evaluate,
    export,
    jobs,
    k8s,
    models,
    plan,
    predict,
    report,
    runs,
    slurm,
    submit,
    sweep,
    train,
    ui,
)
from launch.cli.common.output import console, errors, escape_unencodable
from launch.cli.common.tmpdir import short_tmpdir
from pipeline.errors import TrainingError, UserError

GROUPS = {
    "Data and plan": (data, configs, plan),
    "Train": (train, submit, jobs, slurm, sweep),
    "Runs and models": (runs, report, ui, models, evaluate, predict, export),
    "Installation": (doctor, k8s),
}
_EXIT_CODES = "0 done, 1 training failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM and 129 SIGHUP after a checkpoint"


def names(group: str) -> list[str]:
    """Returns the names of a group's commands, in the order of the help."""
    return [str(typer.main.get_command(module.app).name) for module in GROUPS[group]]


class _Grouped(TyperGroup):
    """Lists the commands by group."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for group in GROUPS:
            commands = {name: self.get_command(ctx, name) for name in names(group)}
            limit = formatter.width - 6 - max(map(len, commands))
            with formatter.section(group):
                formatter.write_dl([(n, c.get_short_help_str(limit)) for n, c in commands.items() if c is not None])


app = typer.Typer(
    cls=_Grouped,
    epilog=f"Exit codes: {_EXIT_CODES}.",
    help="Train DenseNets on ImageNet: on one CPU, one GPU or many GPU nodes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for modules in GROUPS.values():
    for module in modules:
        app.add_typer(module.app)
log = logging.getLogger(__name__)


@app.callback()
def settings(
    verbose: Annotated[bool, typer.Option("--verbose", help="print library logs, and tracebacks of errors")] = False,
) -> None:
    """Handles the options before the command."""
    if verbose:
        logging.basicConfig(level=logging.INFO)


def main() -> None:
    """Runs the command line; its help lists the exit codes."""
    escape_unencodable(sys.stdout, sys.stderr)
    console.file = sys.stdout  # fixed here: while Ray runs, sys.stdout is redirected to a log file
    try:
        with short_tmpdir():
            app()
    except UserError as error:
        log.info("traceback of the error:", exc_info=True)
        errors.print(f"error: {error}", style="red")
        sys.exit(2)
    except TrainingError as error:
        log.info("traceback of the error:", exc_info=True)
        errors.print(f"training failed: {error}", style="red")
        sys.exit(1)
