"""Connections to Ray: an existing cluster, or a local Ray that this process starts."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import ray
from ray.autoscaler.sdk import request_resources

from launch.cluster.allocation import InsufficientResources, Resources, allocate
from launch.cluster.ports import HOST, is_reachable
from pipeline.config import Elastic, RunConfig
from pipeline.errors import UserError

_CONNECT_TIMEOUT_S = 5
_POLL_S = 2
# Timeouts of Ray's own processes, in seconds or ms: on a busy or suspended machine they are slow, not lost.
_RAY_TIMEOUTS = {
    "gcs_rpc_server_reconnect_timeout_s": 1800,
    "gcs_server_request_timeout_seconds": 600,
    "worker_register_timeout_seconds": 600,
    "agent_register_timeout_ms": 600_000,
    "health_check_timeout_ms": 600_000,
}
_NO_CLUSTER = (
    "Start a cluster with `ray start --head`, correct the address, or unset RAY_ADDRESS to run on this machine."
)


@contextmanager
def connected_ray(address: str, log_file: Path) -> Iterator[str]:
    """Connects to the cluster at `address`, and disconnects at the end; yields the dashboard's URL.

    Raises:
        UserError: The cluster is unreachable.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit() and not is_reachable(host, int(port), _CONNECT_TIMEOUT_S):
        # Ray itself would retry for minutes.
        raise UserError(f"the Ray address {address} is unreachable. {_NO_CLUSTER}")
    with _redirect_ray_logs(log_file):
        try:
            with _ray_process_environment(log_file.parent):
                ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address}: {str(error).splitlines()[0]} {_NO_CLUSTER}") from error
        try:
            yield _dashboard_url()
        finally:
            ray.shutdown()


@contextmanager
def embedded_ray(num_cpus: int, dashboard_port: int, log_file: Path) -> Iterator[str]:
    """Starts a local Ray on loopback for this run, and stops it at the end; yields the dashboard's URL.

    Other Ray clusters on the machine are neither joined nor changed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _redirect_ray_logs(log_file):
        with _ray_process_environment(log_file.parent):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                dashboard_host=HOST,
                dashboard_port=dashboard_port,
                log_to_driver=False,
                _system_config=_RAY_TIMEOUTS,
            )
        try:
            yield _dashboard_url()
        finally:
            ray.shutdown()


@contextmanager
def _ray_process_environment(folder: Path) -> Iterator[None]:
    """Sets what Ray's processes inherit from this one: `folder` as working folder, and an ignored SIGHUP.

    Ray puts the driver's working folder first in its workers' import path, where the user may have another package
    `launch`. A terminal that closes sends SIGHUP to all its processes, and only the driver must handle it.
    """
    main = threading.current_thread() is threading.main_thread()  # only this thread may set signal handlers
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN) if main else None
    try:
        with chdir(folder):
            yield
    finally:
        if main:
            signal.signal(signal.SIGHUP, previous)


def _dashboard_url() -> str:
    return f"http://{_node_info()['webui_url']}"


def ray_log_folder() -> str:
    """Returns the folder with the logs of Ray's own processes on the driver's node."""
    return f"{os.path.realpath(_node_info()['session_dir'])}/logs"


def _node_info() -> dict[str, str]:
    """Returns Ray's description of the driver's node."""
    return ray.get_runtime_context().worker.node.address_info


def node_id(address: str) -> str:
    """Returns the id of this process's node in the cluster at `address`."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    node = ray.get_runtime_context().get_node_id()
    ray.shutdown()
    return node


def run_test_task() -> int:
    """Runs a task on the connected cluster, and returns the id of its process."""
    return ray.get(ray.remote(lambda: os.getpid()).remote())


def cluster_resources(address: str) -> Resources:
    """Returns the CPU cores, GPUs and custom resources of the connected cluster."""
    total = ray.cluster_resources()
    custom = {name: amount for name, amount in total.items() if name not in ("CPU", "GPU")}
    name = f"the cluster at {address}"
    return Resources(name, int(total.get("CPU", 0)), int(total.get("GPU", 0)), embedded=False, custom=custom)


def wait_for_resources(config: RunConfig, address: str, warn: Callable[[str], None]) -> None:
    """Requests the run's resources from the autoscaler, and waits for them; `warn` gets the reason once.

    Raises:
        UserError: The run cannot start for a reason that more nodes do not change.
    """
    waiting = False
    while True:
        try:
            allocate(config, cluster_resources(address))
            return
        except InsufficientResources as error:
            if not waiting:
                warn(f"waiting: {error}")
                request_resources(bundles=_resource_bundles(config))
                waiting = True
        time.sleep(_POLL_S)


def _resource_bundles(config: RunConfig) -> list[dict[str, float]]:
    """Returns the least resources of each worker, for the autoscaler."""
    cluster = config.cluster
    workers = cluster.workers.min if isinstance(cluster.workers, Elastic) else cluster.workers
    cpus = 1 if cluster.cpus_per_worker == "auto" else cluster.cpus_per_worker
    gpus = {"GPU": 1.0} if config.device == "cuda" else {}
    return [{"CPU": cpus} | gpus | cluster.resources] * (1 if workers == "auto" else workers)


@contextmanager
def _redirect_ray_logs(file: Path) -> Iterator[None]:
    """Appends Ray's log, and what Ray prints in this process, to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("ray")
    handlers, propagate = logger.handlers[:], logger.propagate
    with file.open("a", encoding="utf-8", buffering=1) as stream:
        logger.handlers, logger.propagate = [logging.StreamHandler(stream)], False
        try:
            with redirect_stdout(stream), redirect_stderr(stream):
                yield
        finally:
            logger.handlers, logger.propagate = handlers, propagate
