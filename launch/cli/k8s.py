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
Part = Annotated[
    str,
    typer.Option(
        help="run: the objects of one run; namespace: service account and volumes, which its runs share; cluster: the "
        "namespace and objects outside of namespaces"
    ),
]
Image = Annotated[
    str | None, typer.Option(help="REPOSITORY:TAG or REPOSITORY@DIGEST; for part run", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="cluster setting, KEY=VALUE, for example nodes=4: nodes, gpus-per-node, cpus-per-node, memory, "
        "storage-class, stage-class, secret, namespace, grace-period or egress; repeatable",
    ),
]


@app.command()
def render(
    config: Config,
    overlay: Overlay,
    image: Image = None,
    part: Part = "run",
    overrides: Overrides = None,
    settings: Set = None,
) -> None:
    """Print the manifests of a training run, or those that its namespace or its cluster needs once.

    Example: densenet k8s render demo run.name=first --overlay local-cpu --image REGISTRY/densenet:0.1.0
    """
    from launch.kubernetes import manifests

    sys.stdout.write(manifests.render(config, overrides or [], overlay, part, image, settings or []))


@app.command()
def diff(
    config: Config,
    overlay: Overlay,
    image: Image = None,
    part: Part = "run",
    overrides: Overrides = None,
    settings: Set = None,
) -> None:
    """Show what applying the manifests would change in the cluster.

    Uses the cluster of kubectl's context. Exit code 1 if something would change, 2 if the cluster is unreachable.

    Example: densenet k8s diff demo run.name=first --overlay local-cpu --image REGISTRY/densenet:0.1.0
    """
    from launch.kubernetes import diff, manifests

    changes = diff.changes(manifests.render(config, overrides or [], overlay, part, image, settings or []))
    sys.stdout.write(changes)
    raise typer.Exit(1 if changes else 0)


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
