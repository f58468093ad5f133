"""Addresses and ports."""

import os
import socket

from pipeline.errors import UserError

HOST = "127.0.0.1"


def cluster_address(option: str | None) -> str | None:
    """The address of the Ray cluster to join: the option, else RAY_ADDRESS (set inside a Ray job), else None."""
    return option or os.environ.get("RAY_ADDRESS") or None


def free_port() -> int:
    """A port of 127.0.0.1 that nothing uses at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def check_port(port: int, option: str) -> None:
    """Raises `UserError` naming `option` when `port` of 127.0.0.1 cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"{option}={port} cannot be used on {HOST}: {error.strerror}. "
                f"Choose another, for example {free_port()}."
            ) from error


def answers(host: str, port: int, timeout_s: float) -> bool:
    """Whether something accepts connections at `host`:`port`."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError:
        return False
    return True
