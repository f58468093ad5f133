"""Arguments and options of several commands."""

from pathlib import Path
from typing import Annotated

import typer

from launch.cluster.ports import DASHBOARD

Config = Annotated[
    Path, typer.Argument(help="YAML file, or a built-in config's name, for example demo", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="config values, KEY=VALUE, for example train.epochs=2", show_default=False)
]
Model = Annotated[
    str, typer.Argument(help="checkpoint or run folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/NAME")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join; default: RAY_ADDRESS, else a local Ray")]
Dashboard = Annotated[
    str | None, typer.Option("--address", help=f"dashboard URL; default: RAY_API_SERVER_ADDRESS, else {DASHBOARD}")
]
Wait = Annotated[bool, typer.Option("--wait", help="wait until the cluster has the resources")]
Uri = Annotated[str | None, typer.Option(help="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else ./outputs")]
RegistryUri = Annotated[
    str | None, typer.Option(help="MLflow registry URI; default: MLFLOW_REGISTRY_URI, else the tracking store")
]
Experiment = Annotated[str, typer.Option(help="MLflow experiment")]
Classes = Annotated[
    Path | None, typer.Option(help="text file with the classes to use, one per line; a second column merges classes")
]
AsJson = Annotated[bool, typer.Option("--json", help="print everything as JSON, for scripts")]
