"""`densenet ui`: the MLflow UI on loopback."""

import os
import sys

from rich.console import Console

from launch.cluster.net import HOST, check_port
from pipeline.tracking.stores import Stores, shown

_SERVERS = ("http://", "https://")


def ui_command(console: Console, port: int, stores: Stores) -> None:
    """Replaces this process by MLflow's server; a remote server has its UI at its own address."""
    uri, registry = stores.tracking, stores.registry
    if stores.apart and registry.startswith(_SERVERS):
        console.print(f"the registry's UI is at {shown(registry)}", soft_wrap=True)
        registry = uri
    if uri.startswith(_SERVERS):
        console.print(f"the tracking server's UI is at {shown(uri)}")
        return
    check_port(port, "--port")
    console.print(f"MLflow UI at http://{HOST}:{port} for {shown(uri)}; stop it with Ctrl-C", soft_wrap=True)
    # One worker: several are ended by their supervisor where a busy machine takes five seconds to start them.
    arguments = ["server", "--backend-store-uri", uri, "--registry-store-uri", registry]
    arguments += ["--host", HOST, "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])
