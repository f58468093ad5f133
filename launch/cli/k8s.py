"""`densenet k8s`: renders, compares and validates manifests for KubeRay."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.cli.common.options import Config, Overrides
from pipeline.errors import UserError
from pipeline.extras import requires_extra

app = typer.Typer(
    name="k8s", help="Render, compare and validate Kubernetes manifests.", no_args_is_help=True, rich_markup_mode=None
)

Overlay = Annotated[str, typer.Option(help="local-cpu, single-node-8gpu, multi-node, spot or kueue")]
Image = Annotated[str, typer.Option(help="REPOSITORY:TAG or REPOSITORY@DIGEST")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="cluster setting, KEY=VALUE, for example nodes=4: nodes, gpus-per-node, cpus-per-node, memory, "
        "storage-class, stage-class, secret or namespace; repeatable",
    ),
]


@app.command()
def render(config: Config, overlay: Overlay, image: Image, overrides: Overrides = None, settings: Set = None) -> None:
    """Print the manifests of a training run.

    Example: densenet k8s render densenet121 --overlay local-cpu --image REGISTRY/densenet:0.1.0
    """
    sys.stdout.write(_rendered(config, overlay, image, overrides, settings))


@app.command()
def diff(config: Config, overlay: Overlay, image: Image, overrides: Overrides = None, settings: Set = None) -> None:
    """Show what applying the manifests would change in the cluster.

    Uses the cluster of kubectl's context. Exit code 1 if something would change, 2 if the cluster is unreachable.

    Example: densenet k8s diff densenet121 --overlay local-cpu --image REGISTRY/densenet:0.1.0
    """
    from launch.kubernetes import kubectl

    raise typer.Exit(kubectl.diff(_rendered(config, overlay, image, overrides, settings)))


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(help="YAML files")],
    crds: Annotated[Path | None, typer.Option(help="folder with CustomResourceDefinitions")] = None,
) -> None:
    """Validate manifests against the schemas of their kinds.

    Unknown fields are errors.

    Example: densenet k8s validate first.yaml --crds CRDS
    """
    with requires_extra("kubernetes"):
        from launch.kubernetes.schemas import read_documents, schema_errors

    documents = read_documents(files)
    problems = schema_errors(documents, crds)
    if problems:
        raise UserError(f"{len(problems)} problems in {len(documents)} objects:\n  " + "\n  ".join(problems))
    print(f"{len(documents)} objects are valid")


def _rendered(config: Path, overlay: str, image: str, overrides: list[str] | None, settings: list[str] | None) -> str:
    from launch.kubernetes.manifests import Settings, render

    values: dict[str, int | str] = {}
    for text in settings or []:
        key, sign, value = text.partition("=")
        name = key.replace("-", "_")
        if not sign or name not in Settings.__annotations__ or name == "image":
            known = ", ".join(n.replace("_", "-") for n in Settings.__annotations__ if n != "image")
            raise UserError(f"--set {text} is not known: use KEY=VALUE with a KEY of {known}.")
        is_count = name in ("nodes", "gpus_per_node", "cpus_per_node")
        if is_count and (not value.isdecimal() or int(value) < 1):
            raise UserError(f"--set {text}: {key} must be an integer of at least 1.")
        values[name] = int(value) if is_count else value
    return render(config, overrides or [], overlay, Settings(image=image, **values))  # type: ignore[arg-type]
