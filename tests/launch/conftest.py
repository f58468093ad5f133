"""A Ray head on loopback."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.net import answers, free_port
from tests.conftest import BIN

PATIENCE_S = 120


@dataclass(frozen=True)
class Head:
    """A Ray head: its folder, where jobs are submitted, and where drivers connect."""

    folder: Path
    dashboard: str
    address: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def ray_head() -> Iterator[Head]:
    """A Ray head of the test's own, with ports and a temporary folder of its own, ended at the end."""
    folder = Path(tempfile.mkdtemp(prefix="dn", dir="/tmp"))  # short: socket paths have at most 107 characters
    port, dashboard = free_port(), free_port()
    env = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    options = {
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "num-cpus": 2,
        "temp-dir": folder,
    }
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=os.environ | env, check=True, capture_output=True)
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", *(f"--{key}={value}" for key, value in options.items())],
            env=os.environ | env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not answers("127.0.0.1", dashboard, 1):
            assert head.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield Head(folder, f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", env)
    finally:
        head.terminate()  # it ends the processes that it has started
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)
