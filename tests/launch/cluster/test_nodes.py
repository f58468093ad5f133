"""The wait for the nodes of a job: they join, Ray ends before, another program listens at the address."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from launch.cluster.ports import free_port


def wait_for_nodes(address: str, count: int, pid: int, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Returns exit code and output."""
    command = [
        sys.executable,
        "-m",
        "launch.cluster.nodes",
        address,
        str(count),
        "--pid",
        str(pid),
        "--logs",
        "ray.log",
    ]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    return done.returncode, done.stdout


@pytest.mark.parametrize("listen", [False, True])
def test_ray_that_ends_is_an_error_at_once(listen):
    port = free_port()
    with ExitStack() as stack:
        if listen:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        starter = stack.enter_context(subprocess.Popen(["sleep", "4"]))
        code, printed = wait_for_nodes(f"127.0.0.1:{port}", 2, starter.pid)
    assert code == 1
    assert "error: Ray ended before 2 nodes had joined: read ray.log." in printed


@pytest.mark.slow
def test_returns_when_the_nodes_have_joined(cluster):
    env = os.environ | cluster.env
    assert wait_for_nodes(cluster.address, 1, cluster.nodes[0].pid, env) == (0, "")
