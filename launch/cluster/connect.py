"""A Ray to work with: an existing cluster, or one of this process's own."""

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
from launch.cluster.ports import HOST, answers
from pipeline.config import Elastic, RunConfig
from pipeline.errors import UserError

_CONNECT_S = 5
_WAIT_S = 2
# Ray's limits for the answers of its own processes, seconds or ms: a machine so busy, or asleep, is slow and not lost.
_PATIENCE = {
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
def joined(address: str, log_file: Path) -> Iterator[str]:
    """Connects to the cluster at `address`, and leaves it at the end; yields the dashboard's address.

    Raises:
        UserError: no cluster answers there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit() and not answers(host, int(port), _CONNECT_S):
        # Ray itself would go on trying for minutes.
        raise UserError(f"nothing answers at the Ray address {address}. {_NO_CLUSTER}")
    with _ray_logs_to(log_file):
        try:
            with _surroundings(log_file.parent):
                ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address}: {str(error).splitlines()[0]} {_NO_CLUSTER}") from error
        try:
            yield _dashboard()
        finally:
            ray.shutdown()


@contextmanager
def embedded(num_cpus: int, dashboard_port: int, log_file: Path) -> Iterator[str]:
    """Starts a Ray of this run's own on loopback, and stops it at the end; yields the dashboard's address.

    Another cluster on the machine is neither joined nor touched.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _ray_logs_to(log_file):
        with _surroundings(log_file.parent):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                dashboard_host=HOST,
                dashboard_port=dashboard_port,
                log_to_driver=False,
                _system_config=_PATIENCE,
            )
        try:
            yield _dashboard()
        finally:
            ray.shutdown()


@contextmanager
def _surroundings(folder: Path) -> Iterator[None]:
    """What Ray's processes inherit of this one: `folder` to work in, and that they do not heed SIGHUP.

    Ray puts the driver's working folder in front of its workers' import path, where the user may have a `launch` of his
    own. A terminal that closes sends SIGHUP to all processes in it, and the driver alone is to answer it.
    """
    main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if main else None
    try:
        with chdir(folder):
            yield
    finally:
        if main:
            signal.signal(signal.SIGHUP, before)


def _dashboard() -> str:
    return f"http://{_node()['webui_url']}"


def ray_logs() -> str:
    """The folder with the logs of Ray's own processes on the node that this driver is on."""
    return f"{os.path.realpath(_node()['session_dir'])}/logs"


def _node() -> dict[str, str]:
    """What Ray tells of the node that this driver is on."""
    return ray.get_runtime_context().worker.node.address_info


def node_id(address: str) -> str:
    """The id of the node that this process is on, of the cluster at `address`."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    node = ray.get_runtime_context().get_node_id()
    ray.shutdown()
    return node


def try_task() -> int:
    """Runs a task on the connected cluster, and returns the id of the process that it ran in."""
    return ray.get(ray.remote(lambda: os.getpid()).remote())


def offered_by_cluster(address: str) -> Resources:
    """CPU cores, GPUs and further resources of the cluster that this process is connected to."""
    total = ray.cluster_resources()
    further = {name: amount for name, amount in total.items() if name not in ("CPU", "GPU")}
    where = f"the cluster at {address}"
    return Resources(where, int(total.get("CPU", 0)), int(total.get("GPU", 0)), embedded=False, further=further)


def wait_for_resources(config: RunConfig, address: str, told: Callable[[str], None]) -> None:
    """Waits until the cluster has what the run needs, after asking its autoscaler for it; `told` gets the reason once.

    Raises:
        UserError: the run does not fit for a reason that more nodes do not change.
    """
    waits = False
    while True:
        try:
            allocate(config, offered_by_cluster(address))
            return
        except InsufficientResources as error:
            if not waits:
                told(f"waiting: {error}")
                request_resources(bundles=_bundles(config))
                waits = True
        time.sleep(_WAIT_S)


def _bundles(config: RunConfig) -> list[dict[str, float]]:
    """What each worker needs at least, for the autoscaler."""
    cluster = config.cluster
    workers = cluster.workers.min if isinstance(cluster.workers, Elastic) else cluster.workers
    cpus = 1 if cluster.cpus_per_worker == "auto" else cluster.cpus_per_worker
    gpus = {"GPU": 1.0} if config.device == "cuda" else {}
    return [{"CPU": cpus} | gpus | cluster.resources] * (1 if workers == "auto" else workers)


@contextmanager
def _ray_logs_to(file: Path) -> Iterator[None]:
    """Sends Ray's log, and what it prints in this process, to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("ray")
    kept, propagate = logger.handlers[:], logger.propagate
    with file.open("a", encoding="utf-8", buffering=1) as stream:
        logger.handlers, logger.propagate = [logging.StreamHandler(stream)], False
        try:
            with redirect_stdout(stream), redirect_stderr(stream):
                yield
        finally:
            logger.handlers, logger.propagate = kept, propagate
