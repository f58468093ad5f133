"""Waits until the nodes of a job have joined its Ray cluster.

python -m launch.cluster.nodes ADDRESS COUNT --pid PID --logs FILES
"""

import argparse
import os
import sys
import threading
import time
from contextlib import suppress

import psutil
import ray

from launch.cluster.ports import is_reachable

_WAIT_S = 600
_POLL_S = 1


def main() -> None:
    """Exits with 0 when all nodes have joined, and with 1 if Ray ends before or they have not joined in 10 minutes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address", help="HOST:PORT of Ray's head")
    parser.add_argument("count", type=int, help="number of nodes")
    parser.add_argument("--pid", type=int, required=True, help="process that starts Ray on the nodes")
    parser.add_argument("--logs", required=True, help="log files of `ray start`, for messages")
    options = parser.parse_args()
    # A thread, because `ray.init` may block for minutes, for example if another program listens at the address.
    wait = threading.Thread(target=_wait_for_nodes, args=(options.address, options.count), daemon=True)
    wait.start()
    deadline = time.monotonic() + _WAIT_S
    while wait.is_alive():
        if not _is_running(options.pid):
            _fail(f"Ray ended before {options.count} nodes had joined", options.logs)
        if time.monotonic() > deadline:
            _fail(f"{options.count} nodes have not joined Ray at {options.address} in {_WAIT_S} s", options.logs)
        wait.join(_POLL_S)


def _wait_for_nodes(address: str, count: int) -> None:
    host, _, port = address.rpartition(":")
    while not (is_reachable(host, int(port), _POLL_S) and _connected(address)):
        time.sleep(_POLL_S)
    while sum(node["Alive"] for node in ray.nodes()) < count:
        time.sleep(_POLL_S)


def _is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _connected(address: str) -> bool:
    """Returns whether `ray.init` connects: this node joins some moments after the head accepts connections."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
    except (ConnectionError, ValueError, RuntimeError):
        return False
    return True


def _fail(reason: str, logs: str) -> None:
    """Ends the process without `ray.shutdown`, which would wait for a blocked `ray.init`."""
    print(f"error: {reason}: read {logs}.", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
