"""Connections to an existing Ray cluster."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.autoscaler.sdk import request_resources

from launch.cluster.allocation import InsufficientResources, Resources, allocate
from launch.cluster.ports import is_reachable
from launch.cluster.ray_logs import log_to_file, printed_to, ray_process_environment
from pipeline.config import Elastic, RunConfig
from pipeline.errors import UserError

_CONNECT_TIMEOUT_S = 5
_POLL_S = 2
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
    with log_to_file(log_file) as stream, printed_to(stream):
        try:
            with ray_process_environment(log_file.parent):
                ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address}: {str(error).splitlines()[0]} {_NO_CLUSTER}") from error
        try:
            yield f"http://{_node_info()['webui_url']}"
        finally:
            ray.shutdown()


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
