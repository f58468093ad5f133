"""Kueue's view of a run: what its pods request, and the quotas of a queue that admits it."""

from fractions import Fraction
from typing import Any

from launch.kubernetes.pods import GPU
from launch.kubernetes.quantities import format_quantity, parse_quantity

QUEUE = "kueue.x-k8s.io/queue-name"  # the label of a job that Kueue manages
Requests = dict[str, Fraction]  # cores, bytes or devices by resource


def requests_by_flavor(job: dict[str, Any]) -> dict[str, Requests]:
    """Returns the total requests of a RayJob's pods by flavor: `gpu-nodes` for pods with GPUs, else `cpu-nodes`."""
    cluster = job["spec"]["rayClusterSpec"]
    pods = [(1, job["spec"]["submitterPodTemplate"]), (1, cluster["headGroupSpec"]["template"])]
    pods += [(group["replicas"], group["template"]) for group in cluster["workerGroupSpecs"]]
    totals: dict[str, Requests] = {}
    for count, template in pods:
        requested = [container["resources"]["requests"] for container in template["spec"]["containers"]]
        total = totals.setdefault("gpu-nodes" if any(GPU in amounts for amounts in requested) else "cpu-nodes", {})
        for name, amount in [item for amounts in requested for item in amounts.items()]:
            total[name] = total.get(name, Fraction()) + count * parse_quantity(amount)
    return totals


def format_requests(requests: Requests) -> str:
    """Returns requests as text: `cpu 2250m, memory 8704Mi`."""
    return ", ".join(f"{name} {_format(name, amount)}" for name, amount in sorted(requests.items()))


def raise_quotas(queue: dict[str, Any], job: dict[str, Any]) -> None:
    """Raises the nominal quotas of a ClusterQueue that are below what the RayJob's pods request."""
    requests = requests_by_flavor(job)
    for group in queue["spec"]["resourceGroups"]:
        for flavor in group["flavors"]:
            for quota in flavor["resources"]:
                needed = requests.get(flavor["name"], {}).get(quota["name"], Fraction())
                if parse_quantity(quota["nominalQuota"]) < needed:
                    quota["nominalQuota"] = _format(quota["name"], needed)


def _format(name: str, amount: Fraction) -> str:
    return format_quantity(amount, binary=name in ("memory", "ephemeral-storage"))
