"""`densenet models`: lists, compares, registers and promotes models."""

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.common.options import AsJson, Classes, RegistryUri, Uri
from launch.cli.common.output import console
from launch.cli.common.tables import print_table
from pipeline.tracking.stores import stores_from_options

app = typer.Typer(
    name="models", help="List, register, promote and roll back models.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(help="registered model name")]
Version = Annotated[str, typer.Argument(help="NAME@ALIAS, NAME/VERSION, or NAME for the newest")]


@app.command("list")
def list_models(uri: Uri = None, registry_uri: RegistryUri = None, as_json: AsJson = False) -> None:
    """List the built-in and the registered models.

    With --json only the registered ones, with all their versions.

    Example: densenet models list
    """
    from launch.cli.common.model_tables import registered_as_json, registered_command
    from pipeline.model.architectures import ARCHITECTURES, PAPER_ACCURACY, size

    stores = stores_from_options(uri, registry_uri)
    if as_json:
        registered_as_json(stores)
        return
    rows = []
    for name, architecture in ARCHITECTURES.items():
        small = name == "densenet_tiny" or architecture.get("stem_type") == "cifar"
        classes, side = (10, 32) if small else (1000, 224)
        counted = size(name, classes, side)
        multiply_adds = f"{counted.multiply_adds / 1e9:.3f}"
        paper = PAPER_ACCURACY.get(name, "not in the paper")
        rows.append((name, str(classes), f"{counted.parameters:,}", multiply_adds, str(side), paper))
    numbers = ("classes", "parameters", "G multiply-adds", "at pixels")
    print_table(console, ("name", *numbers, "paper, top-1 / top-5 %"), rows, right=numbers)
    console.print()
    registered_command(console, stores)


@app.command()
def show(model: Version, uri: Uri = None, registry_uri: RegistryUri = None, as_json: AsJson = False) -> None:
    """Show a registered model's aliases, results, tags and run.

    Example: densenet models show densenet121@champion
    """
    from launch.cli.common.model_tables import show_command

    show_command(console, model, stores_from_options(uri, registry_uri), as_json)


@app.command()
def diff(first: Version, second: Version, uri: Uri = None, registry_uri: RegistryUri = None) -> None:
    """Show the differences of two registered models.

    Compares tags, and the parameters of their runs.

    Example: densenet models diff densenet121@champion densenet121@candidate
    """
    from launch.cli.common.model_tables import diff_command

    diff_command(console, first, second, stores_from_options(uri, registry_uri))


@app.command()
def register(
    folder: Annotated[Path, typer.Argument(help="folder of a finished run, for example outputs/RUN")],
    name: Annotated[str | None, typer.Option("--as", help="registered model name; default: the run's")] = None,
    alias: Annotated[str | None, typer.Option(help="alias for the new version; default: the run's")] = None,
    timeout: Annotated[float, typer.Option(min=0, help="seconds to wait for the stores")] = 60,
    uri: Annotated[str | None, typer.Option(help="MLflow tracking URI; default: the run's")] = None,
    registry_uri: Annotated[str | None, typer.Option(help="MLflow registry URI; default: the run's")] = None,
) -> None:
    """Register a finished run's best checkpoint.

    For a model that the registry did not accept at the end of training.

    Example: densenet models register outputs/first --alias candidate
    """
    from launch.run.register import register_run

    options = {"registered_model_name": name, "alias": alias, "uri": uri, "registry_uri": registry_uri}
    overrides = [f"tracking.{key}={value}" for key, value in options.items() if value is not None]
    registered, registry = register_run(folder, overrides, console.print, timeout)
    about = f"{registered.name} version {registered.version} in {registry}, alias {registered.alias}"
    console.print(f"{about} ({registered.uri})", soft_wrap=True, markup=False)


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="NAME@ALIAS or models:/NAME/VERSION, for example densenet121@candidate")],
    data: Annotated[Path, typer.Option(help="data set folder, or a folder with class folders")],
    to: Annotated[str, typer.Option(help="alias to move")] = "champion",
    split: Annotated[str, typer.Option(help="split of the data set")] = "val",
    classes: Classes = None,
    min_gain: Annotated[float, typer.Option(help="minimum top-1 gain, percentage points")] = 0.0,
    max_p: Annotated[float, typer.Option(min=0, max=1, help="maximum p-value of McNemar's test")] = 0.05,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="compare only, move no alias")] = False,
    uri: Uri = None,
    registry_uri: RegistryUri = None,
) -> None:
    """Move an alias to a model if it is better on the same images.

    Exit code 1 if it is not.

    Example: densenet models promote densenet121@candidate --data /data/imagenet
    """
    from launch.cli.common.model_tables import print_candidate
    from launch.run import promote

    stores = stores_from_options(uri, registry_uri)
    candidate = promote.evaluate_candidate(model, to, data, split, stores, classes=classes, will_promote=not dry_run)
    passes = candidate.passes(min_gain, max_p)
    print_candidate(console, candidate)
    if candidate.paired is not None:
        result = "yes" if passes else "no"
        console.print(f"required: a gain of at least {min_gain:g} points with p of at most {max_p:g}: {result}")
    if not passes:
        console.print(f"{candidate.name}@{to} stays version {candidate.old}", style="yellow")
    elif dry_run:
        console.print(f"{candidate.name}@{to} would become version {candidate.new} (dry run)")
    else:
        promote.promote(candidate, stores)
        console.print(f"{candidate.name}@{to} is version {candidate.new} now", style="green")
    raise typer.Exit(0 if passes else 1)


@app.command()
def rollback(
    name: Name,
    alias: Annotated[str, typer.Option(help="alias to move")] = "champion",
    uri: Uri = None,
    registry_uri: RegistryUri = None,
) -> None:
    """Move an alias back to its previous version.

    Example: densenet models rollback densenet121
    """
    from launch.run import promote

    restored, replaced = promote.rollback(name, alias, stores_from_options(uri, registry_uri))
    console.print(f"{name}@{alias} is version {restored} again, it was version {replaced}")


@app.command()
def history(name: Name, uri: Uri = None, registry_uri: RegistryUri = None) -> None:
    """Show a registered model's versions, aliases and promotions.

    Example: densenet models history densenet121
    """
    from launch.cli.common.model_tables import history_command

    history_command(console, name, stores_from_options(uri, registry_uri))
