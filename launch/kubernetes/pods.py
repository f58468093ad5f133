"""Fits the pods of an overlay's RayJob to a config: workers and resources, volumes, credentials, preStop hook."""

import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

from launch.cluster.allocation import InsufficientResources, Resources, allocate
from launch.kubernetes.quantities import format_quantity, parse_quantity
from launch.kubernetes.settings import Settings
from pipeline.config import Elastic, RunConfig
from pipeline.data.staging import is_remote
from pipeline.derived import split_batch
from pipeline.errors import UserError
from pipeline.locations import is_uri, locations

GPU = "nvidia.com/gpu"
_GIB = 2**30
_FILE_SYSTEM = 1.1  # size of a volume to that of the files in it
STAGE = "/stage"  # mount of the component `stage`
_POD_MOUNTS = ("/tmp", "/dev/shm", "/etc/densenet", STAGE)  # mounts that pods do not share
_SQLITE = "sqlite:///"


def fit_pods(job: dict[str, Any], config: RunConfig, overlay: str, settings: Settings) -> None:
    """Changes the pods of a RayJob to those that the config and the settings require.

    Raises:
        UserError: The config does not fit the overlay's nodes or volumes, or needs another setting.
    """
    cluster = job["spec"]["rayClusterSpec"]
    head, (group,) = cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"]
    worker = group["template"]["spec"]
    _check_locations(config, worker["containers"][0])
    _fit_workers(group, config, overlay, settings)
    _set_credentials([head, worker], config, settings)
    _set_stage_volume(worker, config, settings)
    _set_grace_period(worker, config, settings)


def _check_locations(config: RunConfig, container: dict[str, Any]) -> None:
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    for key, mark, location in locations(config):
        path = location.removeprefix(_SQLITE)
        is_output = mark.kind == "output" or path != location
        if (mark.kind not in ("input", "output") and path == location) or is_uri(path):
            continue
        path = os.path.normpath(path)
        shared = [mount for at, mount in mounts.items() if Path(path).is_relative_to(at) and at not in _POD_MOUNTS]
        if not shared or (is_output and shared[0].get("readOnly")):
            volume = "/runs" if is_output else "/data"
            raise UserError(f"{key}={location} must be below {volume}, a volume that all pods share.")


def _fit_workers(group: dict[str, Any], config: RunConfig, overlay: str, settings: Settings) -> None:
    """Sets the number of worker pods and their resources, after the checks of `densenet plan`."""
    pod = group["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    limits = resources["limits"]
    if settings.gpus_per_node and GPU not in limits:
        raise UserError(f"--overlay={overlay} has nodes without GPUs: omit gpus-per-node, or use another overlay.")
    gpus = settings.gpus_per_node or int(limits.get(GPU, 0))
    cpus = settings.cpus_per_node or int(limits["cpu"])
    low, high = _pods(config, overlay, group["replicas"], cpus, gpus, settings)
    group |= {"replicas": low, "minReplicas": low, "maxReplicas": high}
    changes = {"cpu": settings.cpus_per_node, "memory": settings.memory, GPU: settings.gpus_per_node}
    for amounts in (resources["requests"], limits):
        amounts |= {name: str(amount) for name, amount in changes.items() if amount is not None}
    (shm,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
    half = Fraction(parse_quantity(limits["memory"]) // 2)
    if parse_quantity(shm["sizeLimit"]) > half:  # /dev/shm counts as the pod's memory
        shm["sizeLimit"] = format_quantity(half, binary=True)


def _pods(config: RunConfig, overlay: str, default: int, cpus: int, gpus: int, settings: Settings) -> tuple[int, int]:
    """Returns the minimum and maximum number of worker pods, of `cpus` cores and `gpus` GPUs each."""
    requested = config.cluster.workers
    per_pod = gpus or (cpus if config.cluster.cpus_per_worker == "auto" else cpus // config.cluster.cpus_per_worker)
    if isinstance(requested, Elastic):
        if settings.nodes is not None:
            raise UserError("--set nodes is for a fixed number of workers: omit it, cluster.workers sets min and max.")
        low, high = (_pods_of(count, per_pod, gpus) for count in (requested.min, requested.max))
    else:
        low = high = settings.nodes or (default if requested == "auto" else _pods_of(requested, per_pod, gpus))
    available = Resources(f"overlay {overlay} with {high} worker pods", cpus * high, gpus * high, embedded=False)
    try:
        split_batch(config, allocate(config, available).workers)
    except InsufficientResources as error:
        raise UserError(f"{error.reason}.") from error
    if gpus and requested != "auto" and not isinstance(requested, Elastic) and requested != gpus * high:
        raise UserError(
            f"cluster.workers={requested} must be {gpus * high}: one worker per GPU on {high} nodes with {gpus} GPUs."
        )
    return low, high


def _pods_of(workers: int, per_pod: int, gpus: int) -> int:
    """Returns the number of pods for the workers; on GPUs, workers must fill whole nodes."""
    if gpus and workers % gpus:
        raise UserError(
            f"cluster.workers={workers} does not fill nodes with {gpus} GPUs each: use a multiple of {gpus}, or set "
            f"gpus-per-node."
        )
    return max(1, -(-workers // max(1, per_pod)))


def _set_credentials(pods: list[dict[str, Any]], config: RunConfig, settings: Settings) -> None:
    """Sets the Secret whose keys are environment variables of the pods."""
    for key, mark, location in locations(config):
        if mark.kind != "store" and is_remote(location) and settings.secret is None:
            raise UserError(
                f"{key}={location} needs credentials: use --set secret=NAME of a Secret (k8s/secrets.example.yaml), or "
                f"--set secret=none if the pods' service account has the permissions."
            )
    if settings.secret is not None:
        sources = [] if settings.secret == "none" else [{"secretRef": {"name": settings.secret}}]
        for pod in pods:
            pod["containers"][0]["envFrom"] = sources


def _set_stage_volume(pod: dict[str, Any], config: RunConfig, settings: Settings) -> None:
    """Sets storage class and size of the node-local volume, which the component `stage` has added for `data.stage`."""
    if config.data.stage is None:
        if settings.stage_class is not None:
            raise UserError(f"--set stage-class needs data.stage={STAGE}, which is not set.")
        return
    if not Path(os.path.normpath(config.data.stage)).is_relative_to(STAGE):
        raise UserError(f"data.stage={config.data.stage} must be below {STAGE}, the node's local disk.")
    if settings.stage_class is None:
        raise UserError(
            f"data.stage={config.data.stage} needs a local disk on each node: use --set stage-class=NAME of a class of "
            f"node-local volumes (kubectl get storageclass)."
        )
    (claim,) = (volume["ephemeral"]["volumeClaimTemplate"] for volume in pod["volumes"] if volume["name"] == "stage")
    claim["spec"]["storageClassName"] = settings.stage_class
    if config.data.stage_limit_bytes is not None:
        size = Fraction(math.ceil(config.data.stage_limit_bytes * _FILE_SYSTEM / _GIB) * _GIB)
        claim["spec"]["resources"]["requests"]["storage"] = format_quantity(size, binary=True)


def _set_grace_period(pod: dict[str, Any], config: RunConfig, settings: Settings) -> None:
    """Sets the run folder that the preStop hook watches, and how long: two thirds of the grace period."""
    hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    hook[hook.index("--run") + 1] = os.path.join(config.run.output, str(config.run.name))
    if settings.grace_period is not None:
        pod["terminationGracePeriodSeconds"] = settings.grace_period
        hook[hook.index("--wait") + 1] = str(settings.grace_period * 2 // 3)
