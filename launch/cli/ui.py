"""`densenet ui`: starts the MLflow UI on loopback."""

import os
import sys
from typing import Annotated

import typer

from launch.cli.common.options import RegistryUri, Uri
from launch.cli.common.output import console
from launch.cluster.ports import HOST, check_port
from pipeline.tracking.stores import redacted, stores_from_options

app = typer.Typer()

_SERVERS = ("http://", "https://")


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="port on 127.0.0.1")] = 5000,
    uri: Uri = None,
    registry_uri: RegistryUri = None,
) -> None:
    """Start the MLflow UI on this machine.

    Example: densenet ui --port 5000
    """
    stores = stores_from_options(uri, registry_uri)
    tracking, registry = stores.tracking, stores.registry
    if stores.separate_registry and registry.startswith(_SERVERS):  # a remote server has its own UI
        console.print(f"the registry's UI is at {redacted(registry)}", soft_wrap=True)
        registry = tracking
    if tracking.startswith(_SERVERS):
        console.print(f"the tracking server's UI is at {redacted(tracking)}")
        return
    check_port(port, "--port")
    console.print(f"MLflow UI at http://{HOST}:{port} for {redacted(tracking)}; stop it with Ctrl-C", soft_wrap=True)
    # One worker: the supervisor of several ends those that take more than five seconds to start on a busy machine.
    arguments = ["server", "--backend-store-uri", tracking, "--registry-store-uri", registry]
    arguments += ["--host", HOST, "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])  # replaces this process
