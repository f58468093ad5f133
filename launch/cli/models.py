"""`densenet models`: which models there are, and the gate in front of the registry's aliases."""

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.common.options import AsJson, RegistryUri, Uri
from launch.cli.common.output import console
from launch.cli.common.tables import print_table
from pipeline.tracking.stores import stores_from_options

app = typer.Typer(
    name="models", help="DenseNets by name, and registered ones.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(help="of a registered model")]
Version = Annotated[str, typer.Argument(help="NAME@ALIAS, NAME/VERSION, or NAME for the newest")]


@app.command("list")
def list_models(uri: Uri = None, registry_uri: RegistryUri = None, as_json: AsJson = False) -> None:
    """Show the models by name, and the models that are registered.

    As JSON the registered ones alone, with all their versions.

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
    """Show what is known of a registered model.

    Example: densenet models show densenet121@champion
    """
    from launch.cli.common.model_tables import show_command

    show_command(console, model, stores_from_options(uri, registry_uri), as_json)


@app.command()
def diff(first: Version, second: Version, uri: Uri = None, registry_uri: RegistryUri = None) -> None:
    """Show what two registered models differ in.

    Results, transform, and the parameters of their runs.

    Example: densenet models diff densenet121@champion densenet121@candidate
    """
    from launch.cli.common.model_tables import diff_command

    diff_command(console, first, second, stores_from_options(uri, registry_uri))


@app.command()
def register(
    folder: Annotated[Path, typer.Argument(help="a finished run's folder, as outputs/RUN")],
    name: Annotated[str | None, typer.Option("--as", help="registered model name; default: as in the run")] = None,
    alias: Annotated[str | None, typer.Option(help="moved to the new version; default: as in the run")] = None,
    timeout: Annotated[float, typer.Option(min=0, help="seconds to wait for the stores")] = 60,
    uri: Annotated[str | None, typer.Option(help="MLflow tracking URI; default: as in the run")] = None,
    registry_uri: Annotated[str | None, typer.Option(help="MLflow registry URI; default: as in the run")] = None,
) -> None:
    """Register a finished run's best checkpoint.

    For a registry that did not take it at the end of the training.

    Example: densenet models register outputs/first --alias candidate
    """
    from launch.run.register import register_run

    given = {"registered_model_name": name, "alias": alias, "uri": uri, "registry_uri": registry_uri}
    overrides = [f"tracking.{key}={value}" for key, value in given.items() if value is not None]
    registered, registry = register_run(folder, overrides, console.print, timeout)
    about = f"{registered.name} version {registered.version} in {registry}, alias {registered.alias}"
    console.print(f"{about} ({registered.uri})", soft_wrap=True, markup=False)


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="NAME@ALIAS or models:/NAME/VERSION, as densenet121@candidate")],
    data: Annotated[Path, typer.Option(help="a data set's folder, or a folder with class folders")],
    to: Annotated[str, typer.Option(help="the alias that moves")] = "champion",
    split: Annotated[str, typer.Option(help="of the data set")] = "val",
    min_gain: Annotated[float, typer.Option(help="least gain of top-1, percentage points")] = 0.0,
    max_p: Annotated[float, typer.Option(min=0, max=1, help="largest p-value of McNemar's test")] = 0.05,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="compare alone")] = False,
    uri: Uri = None,
    registry_uri: RegistryUri = None,
) -> None:
    """Move an alias to a model that is better on the same images.

    Exit code 1 where it is not.

    Example: densenet models promote densenet121@candidate --data /data/imagenet
    """
    from launch.cli.common.model_tables import print_candidate
    from launch.run.promote import move, weigh

    stores = stores_from_options(uri, registry_uri)
    found = weigh(model, to, data, split, stores, will_move=not dry_run)
    holds = found.holds(min_gain, max_p)
    print_candidate(console, found)
    if found.paired is not None:
        console.print(
            f"asked for: a gain of {min_gain:g} points or more at p {max_p:g} or less: {'yes' if holds else 'no'}"
        )
    if not holds:
        console.print(f"{found.name}@{to} stays version {found.old}", style="yellow")
    elif dry_run:
        console.print(f"{found.name}@{to} would become version {found.new} (dry run)")
    else:
        move(found, stores)
        console.print(f"{found.name}@{to} is version {found.new} now", style="green")
    raise typer.Exit(0 if holds else 1)


@app.command()
def rollback(
    name: Name,
    alias: Annotated[str, typer.Option(help="the alias that moves")] = "champion",
    uri: Uri = None,
    registry_uri: RegistryUri = None,
) -> None:
    """Move an alias back to the version that it was before.

    Example: densenet models rollback densenet121
    """
    from launch.run import promote

    now, before = promote.rollback(name, alias, stores_from_options(uri, registry_uri))
    console.print(f"{name}@{alias} is version {now} again, {before} before")


@app.command()
def history(name: Name, uri: Uri = None, registry_uri: RegistryUri = None) -> None:
    """Show a registered model's versions, aliases and promotions.

    Example: densenet models history densenet121
    """
    from launch.cli.common.model_tables import history_command

    history_command(console, name, stores_from_options(uri, registry_uri))
