"""A local Ray for one run: its processes start in a thread, while the driver prepares the run."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._private.node import Node
from ray._private.parameter import RayParams

from launch.cluster import forked_worker
from launch.cluster.ports import HOST
from launch.cluster.ray_logs import log_to_file, printed_to, ray_process_environment

_SETTINGS = {
    "prestart_worker_first_driver": False,  # idle worker processes
    # Timeouts of Ray's own processes, in seconds or ms: on a busy or suspended machine they are slow, not lost.
    "gcs_rpc_server_reconnect_timeout_s": 1800,
    "gcs_server_request_timeout_seconds": 600,
    "worker_register_timeout_seconds": 600,
    "agent_register_timeout_ms": 600_000,
    "health_check_timeout_ms": 600_000,
}
# Settings of Ray Train on one node, unless the environment has others.
_TRAIN_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no node can be taken away; the watcher is a process
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # time until a lost worker is noticed; Ray's default is 2
}
_log = logging.getLogger("ray")


@contextmanager
def embedded_ray(num_cpus: int, log_file: Path, dashboard_port: int | None = None) -> Iterator[str | None]:
    """Starts a local Ray, and stops it at the end; yields the dashboard's URL, or None without `dashboard_port`."""
    with starting_ray(num_cpus, log_file, dashboard_port) as connect:
        yield connect()


@contextmanager
def starting_ray(
    num_cpus: int, log_file: Path, dashboard_port: int | None = None
) -> Iterator[Callable[[], str | None]]:
    """Starts a local Ray in a thread, and stops it at the end.

    Other Ray clusters on the machine are neither joined nor changed.

    Args:
        num_cpus: Ray's number of CPU cores.
        log_file: Receives Ray's log.
        dashboard_port: The dashboard's port; None starts none.

    Yields:
        A function that waits for Ray, connects, and returns the dashboard's URL, or None without a dashboard.
    """
    with _environment({"RAY_USAGE_STATS_ENABLED": "0"} | _TRAIN_SETTINGS), ExitStack() as stack:
        stream = stack.enter_context(log_to_file(log_file))
        ray_processes = _RayProcesses(num_cpus, dashboard_port)
        ray_processes.start()

        def connect() -> str | None:
            node = ray_processes.wait()
            stack.enter_context(printed_to(stream))
            _log.info("Started a local Ray instance, whose processes log to %s.", node.get_logs_dir_path())
            with ray_process_environment(log_file.parent):
                ray.init(address=node.gcs_address, log_to_driver=False)
            return f"http://{node.webui_url}" if node.webui_url else None

        try:
            yield connect
        finally:
            ray.shutdown()
            ray_processes.stop()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables that are not set, for Ray's processes too."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


class _LocalNode(Node):
    """Ray's processes on this machine; without a dashboard, whose start Ray would wait for, unless it is asked for."""

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        if include_dashboard:
            super().start_api_server(include_dashboard=True, raise_on_failure=raise_on_failure)


class _RayProcesses(threading.Thread):
    """Starts Ray's processes, and ends them on `stop`, or with this thread if the driver is killed."""

    def __init__(self, num_cpus: int, dashboard_port: int | None) -> None:
        super().__init__(name="local Ray", daemon=True)
        self._num_cpus, self._dashboard_port = num_cpus, dashboard_port
        self._ready, self._stopping = threading.Event(), threading.Event()
        self._node: Node | None = None
        self._error: BaseException | None = None

    def wait(self) -> Node:
        """Waits until Ray runs; raises the error of its start."""
        self._ready.wait()
        if self._error is not None:
            raise self._error
        assert self._node is not None
        return self._node

    def stop(self) -> None:
        """Ends Ray's processes, also those that are starting."""
        self._stopping.set()
        self.join()

    def run(self) -> None:
        # Child processes inherit the mask: a terminal that closes sends SIGHUP to all, and only the driver handles it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            self._node = self._start()
        except BaseException as error:  # raised again by `wait`
            self._error = error
        self._ready.set()
        self._stopping.wait()
        if self._node is not None:
            self._node.kill_all_processes(check_alive=False, allow_graceful=True)

    def _start(self) -> Node:
        enable_token_auth_by_default()
        ensure_token_if_auth_enabled(create_token_if_missing=True)
        dashboard = {"dashboard_host": HOST, "dashboard_port": self._dashboard_port} if self._dashboard_port else {}
        parameters = RayParams(
            num_cpus=self._num_cpus,
            include_dashboard=self._dashboard_port is not None,
            include_log_monitor=False,  # it copies the output of workers to the driver
            no_monitor=True,  # the autoscaler
            setup_worker_path=forked_worker.__file__,
            _system_config=_SETTINGS,
            **dashboard,
        )
        return _LocalNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)
