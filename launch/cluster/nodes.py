"""`python -m launch.cluster.nodes ADDRESS COUNT` waits until so many nodes have joined a Ray cluster."""

import sys
import time

import ray

from launch.cluster.ports import is_reachable

_WAIT_S = 600
_AGAIN_S = 1


def main(address: str, count: int) -> None:
    """Returns when `count` nodes are in the cluster at `address`; exits with a message when they do not come."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _WAIT_S
    while not (is_reachable(host, int(port), _AGAIN_S) and _connected(address)):
        _sleep(deadline, f"no Ray answers at {address}")
    while (there := sum(node["Alive"] for node in ray.nodes())) < count:
        _sleep(deadline, f"{there} of {count} nodes have joined the Ray cluster at {address}")


def _connected(address: str) -> bool:
    """Whether this node is in the cluster, which it may be some moments after the cluster answers."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
    except (ConnectionError, ValueError, RuntimeError):
        return False
    return True


def _sleep(deadline: float, state: str) -> None:
    if time.monotonic() > deadline:
        sys.exit(f"error: {state} after {_WAIT_S} s: the logs of `ray start` on the nodes tell why.")
    time.sleep(_AGAIN_S)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
