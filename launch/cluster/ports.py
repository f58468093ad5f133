"""Addresses and ports. Needs no Ray."""

import os
import socket
from pathlib import Path

from pipeline.errors import UserError

HOST = "127.0.0.1"
DASHBOARD = f"http://{HOST}:8265"  # Ray's default
_TOKENS = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}


def cluster_address(option: str | None) -> str | None:
    """Returns the address of the Ray cluster to join: the option, else RAY_ADDRESS (set in a Ray job), else None."""
    return option or os.environ.get("RAY_ADDRESS") or None


def dashboard_address(option: str | None) -> str:
    """Returns the URL of the dashboard: the option, else RAY_API_SERVER_ADDRESS, else Ray's default.

    Also enables Ray's token authentication if a token exists. Ray reads that setting on import: call this before.
    """
    if os.environ.keys() & _TOKENS or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return option or os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD


def free_port() -> int:
    """Returns a port of 127.0.0.1 that is free at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def check_port(port: int, option: str) -> None:
    """Raises `UserError`, which names `option`, if `port` of 127.0.0.1 is in use or not allowed."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"{option}={port} cannot be used on {HOST}: {error.strerror}. "
                f"Choose another, for example {free_port()}."
            ) from error


def is_reachable(host: str, port: int, timeout_s: float) -> bool:
    """Returns whether `host`:`port` accepts TCP connections."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError:
        return False
    return True
