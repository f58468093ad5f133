"""A local Ray for one run: its processes start in a thread, while the driver prepares the run."""

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._private.grpc_utils import init_grpc_channel
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

from launch.cluster import preload
from launch.cluster.allocation import Allocation
from launch.cluster.ports import HOST
from launch.cluster.ray_logs import log_to_file, printed_to, ray_process_environment
from pipeline.config import RunConfig
from pipeline.config_fields import Device
from pipeline.train.events import Event, Step, WorkersStarted

_SETTINGS = {
    "preload_python_modules": [preload.__name__],
    "prestart_worker_first_driver": False,  # `starting_ray` starts the processes that the run needs
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
_TRAIN_VARIABLES = ("RAY_TRAIN_", "TORCHFT_LIGHTHOUSE", "NCCL_RAS_ADDR")  # Ray Train passes them on
_SPARES_FROM_S = 120  # seconds left in training; starting spare workers takes a few seconds of CPU time for each
_RPC_TIMEOUT_S = 30
_KEEP_ALIVE_S = 24 * 3600
_log = logging.getLogger("ray")


@dataclass(frozen=True)
class Processes:
    """Processes that Ray starts ahead of the actors that will run in them.

    Attributes:
        count: Number of processes.
        runtime_env: The runtime environment of the actors, serialized as Ray does: it compares hashes of the text.
    """

    count: int
    runtime_env: str


def worker_env(config: RunConfig, device: Device) -> dict[str, str]:
    """Returns all environment variables of the training workers' runtime environment."""
    preloaded = {preload.DEVICE: device} if device == "cpu" else {}  # not tried on GPUs
    return _controller_env() | config.cluster.env | preloaded


def training_processes(config: RunConfig, allocation: Allocation) -> list[Processes]:
    """Returns the processes of a training run: its workers, and those of Ray Train and of the event channel."""
    # Ray serializes in C++ where it merges the environment of a child with that of its parent, and else in Python.
    controller = json.dumps({"env_vars": _controller_env()}, sort_keys=True)
    worker = {"env_vars": worker_env(config, allocation.device)}
    workers = json.dumps(worker, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    others = [Processes(1, controller), Processes(1, "")]  # for the controller; for the event channel
    return [Processes(allocation.workers, workers), *others] if allocation.device == "cpu" else others


class SpareWorkers:
    """Processes for the workers of the next start, so that a restart after a lost worker need not import packages."""

    def __init__(self, config: RunConfig, allocation: Allocation) -> None:
        self._processes = training_processes(config, allocation)[:1]
        self._wanted = allocation.embedded and allocation.device == "cpu" and config.cluster.max_failures > 0
        self._started = False

    def on_event(self, event: Event) -> None:
        """Starts them in a run with minutes left, once for each start of the workers."""
        if isinstance(event, WorkersStarted):
            self._started = False
        elif isinstance(event, Step) and self._wanted and not self._started and event.eta_s > _SPARES_FROM_S:
            self._started = True
            with suppress(grpc.RpcError):  # a restart works without them too
                _start_workers(ray.get_runtime_context().worker.node, self._processes)


def _controller_env() -> dict[str, str]:
    """Returns the environment variables that Ray Train sets for its controller, and the controller's actors inherit."""
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(_TRAIN_VARIABLES)}
    return {preload.CONTROLLER: os.environ.get(preload.CONTROLLER, "0")} | _TRAIN_SETTINGS | passed_on


@contextmanager
def embedded_ray(num_cpus: int, log_file: Path, dashboard_port: int | None = None) -> Iterator[str | None]:
    """Starts a local Ray, and stops it at the end; yields the dashboard's URL, or None without `dashboard_port`."""
    with starting_ray(num_cpus, log_file, dashboard_port) as connect:
        yield connect()


@contextmanager
def starting_ray(
    num_cpus: int, log_file: Path, dashboard_port: int | None = None, processes: Sequence[Processes] = ()
) -> Iterator[Callable[[], str | None]]:
    """Starts a local Ray in a thread, and stops it at the end.

    Other Ray clusters on the machine are neither joined nor changed.

    Args:
        num_cpus: Ray's number of CPU cores.
        log_file: Receives Ray's log.
        dashboard_port: The dashboard's port; None starts none.
        processes: Processes that Ray starts at once.

    Yields:
        A function that waits for Ray, connects, and returns the dashboard's URL, or None without a dashboard.
    """
    with _environment({"RAY_USAGE_STATS_ENABLED": "0"} | _TRAIN_SETTINGS), ExitStack() as stack:
        stream = stack.enter_context(log_to_file(log_file))
        ray_processes = _RayProcesses(num_cpus, dashboard_port, processes)
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

    def __init__(self, num_cpus: int, dashboard_port: int | None, processes: Sequence[Processes]) -> None:
        super().__init__(name="local Ray", daemon=True)
        self._num_cpus, self._dashboard_port, self._processes = num_cpus, dashboard_port, processes
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
            if not self._stopping.is_set():
                _start_workers(self._node, self._processes)
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
            _system_config=_SETTINGS,
            **dashboard,
        )
        return _LocalNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)


def _start_workers(node: Node, processes: Sequence[Processes]) -> None:
    """Asks the raylet for worker processes; it gives them to actors with the same runtime environment."""
    with init_grpc_channel(f"{node.node_ip_address}:{node.node_manager_port}") as channel:
        raylet = NodeManagerServiceStub(channel)
        for group in processes:
            request = PrestartWorkersRequest(num_workers=group.count, keep_alive_duration_secs=_KEEP_ALIVE_S)
            request.runtime_env_info.serialized_runtime_env = group.runtime_env
            raylet.PrestartWorkers(request, timeout=_RPC_TIMEOUT_S)
