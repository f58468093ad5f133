"""`densenet ui`: the MLflow UI on loopback."""

import os
import sys

from rich.console import Console

from launch.net import HOST, check_port
from pipeline.tracking.store import default_tracking_uri, shown


def ui_command(console: Console, port: int, uri: str | None) -> None:
    """Replaces this process by MLflow's server; a remote tracking server has its UI at its own address."""
    uri = uri or default_tracking_uri()
    if uri.startswith(("http://", "https://")):
        console.print(f"the tracking server's UI is at {shown(uri)}")
        return
    check_port(port, "--port")
    console.print(f"MLflow UI at http://{HOST}:{port} for {shown(uri)}; stop it with Ctrl-C", soft_wrap=True)
    # One worker: several are ended by their supervisor where a busy machine takes five seconds to start them.
    arguments = ["server", "--backend-store-uri", uri, "--host", HOST, "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])
