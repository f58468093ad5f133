"""A Ray cluster of one or more nodes, each a process group with its own temporary folder."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray

from launch.cluster.ports import free_port, is_reachable
from tests.conftest import BIN

WAIT_TIMEOUT_S = 300  # seconds suffice on an idle machine, a busy one needs minutes
_START_ATTEMPTS = 3


def wait_until(condition: Callable[[], object], describe: Callable[[], str], timeout_s: float = WAIT_TIMEOUT_S) -> None:
    """Waits for a condition; after the timeout fails with the text that `describe` returns."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.2)


class Cluster:
    """A Ray cluster: a head and any number of nodes."""

    def __init__(self, cpus: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dn", dir="/tmp"))  # short: socket paths have at most 107 characters
        self.nodes: list[subprocess.Popen] = []
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        generate = [BIN / "ray", "get-auth-token", "--generate"]
        subprocess.run(generate, env=os.environ | self.env, check=True, capture_output=True)
        port, dashboard = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        options = {
            "head": None,
            "port": port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "ray-client-server-port": free_port(),
        }
        self._start(cpus, options)
        wait_until(lambda: is_reachable("127.0.0.1", dashboard, 1), self._logs)
        self.address = f"{ray.util.get_node_ip_address()}:{port}"

    def add_node(self, cpus: int) -> None:
        """Starts a node; restarts one that Ray ends after 30 s on a busy machine, as Kubernetes restarts a pod."""
        number = len(self.nodes)
        log = self.folder / f"{number}.log"
        for _ in range(_START_ATTEMPTS):
            self._start(cpus, {"address": self.address})
            node = self.nodes[number]
            wait_until(
                lambda node=node: node.poll() is not None or "Ray runtime started" in log.read_text(), self._logs
            )
            if node.poll() is None:
                return
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            shutil.rmtree(self.folder / f"{number}", ignore_errors=True)
            logs = self._logs()
            self.nodes.pop()
        raise AssertionError(logs)

    def kill_node(self, number: int) -> None:
        """Kills all processes of a node at once, as a power failure does."""
        node = psutil.Process(self.nodes[number].pid)
        for process in [node, *node.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.nodes[number].wait()

    def processes(self, name: str) -> list[psutil.Process]:
        """Returns this cluster's processes with `name` in their title, without those of other tests' clusters."""
        running = [node for node in self.nodes if node.poll() is None]
        family = [child for node in running for child in psutil.Process(node.pid).children(recursive=True)]
        found = []
        for process in family:
            with suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()[:1]):
                    found.append(process)
        return found

    def close(self) -> None:
        for number, node in enumerate(self.nodes):
            if node.poll() is None:
                self.kill_node(number)  # on SIGTERM it would wait half a minute for its child processes
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, cpus: int, options: dict[str, object]) -> None:
        number = len(self.nodes)
        options |= {
            "num-cpus": cpus,
            "temp-dir": self.folder / f"{number}",
            "dashboard-agent-listen-port": free_port(),
            "min-worker-port": 0,  # any: nodes that share a machine must not share ports
            "max-worker-port": 0,
        }
        flags = [f"--{key}" if value is None else f"--{key}={value}" for key, value in options.items()]
        with (self.folder / f"{number}.log").open("w") as log:
            self.nodes.append(
                subprocess.Popen(
                    [BIN / "ray", "start", "--block", *flags],
                    env=os.environ | self.env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _logs(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("*.log")))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of a head with two cores, without further nodes."""
    started = Cluster(cpus=2)
    yield started
    started.close()
