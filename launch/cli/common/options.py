"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from launch.cluster.ports import DASHBOARD

Config = Annotated[
    Path, typer.Argument(help="YAML file, or a built-in config's name, for example demo", show_default=False)
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example train.epochs=2")]
Model = Annotated[
    str, typer.Argument(help="checkpoint or run folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/NAME")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join; default: RAY_ADDRESS, else a Ray of its own")]
Dashboard = Annotated[
    str | None, typer.Option("--address", help=f"the dashboard; default: RAY_API_SERVER_ADDRESS, else {DASHBOARD}")
]
Wait = Annotated[bool, typer.Option("--wait", help="wait until the cluster has room for the workers")]
Uri = Annotated[str | None, typer.Option(help="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else ./outputs")]
RegistryUri = Annotated[
    str | None, typer.Option(help="MLflow registry URI; default: MLFLOW_REGISTRY_URI, else the tracking store")
]
Experiment = Annotated[str, typer.Option(help="MLflow experiment")]
AsJson = Annotated[bool, typer.Option("--json", help="for scripts: all that is known, as JSON")]
