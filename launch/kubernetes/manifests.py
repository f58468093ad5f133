"""Renders Kubernetes manifests from a config and an overlay of `k8s/`."""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from launch.cluster.allocation import InsufficientResources, Resources, allocate
from launch.kubernetes.kubectl import kustomize, kustomize_yaml
from pipeline.config import Elastic, RunConfig
from pipeline.config_file import load_config
from pipeline.data.staging import is_remote
from pipeline.derived import split_batch
from pipeline.errors import UserError
from pipeline.locations import is_uri, locations
from pipeline.model.timm_models import check_model

K8S = (Path(__file__).parent / "k8s").resolve()
_GROUP = "/spec/rayClusterSpec/workerGroupSpecs/0"
_GPU = "nvidia.com/gpu"
_POD_MOUNTS = ("/tmp", "/dev/shm", "/etc/densenet")  # mounts that pods do not share
_STAGE = "/stage"  # mount of the component `stage`
_BUNDLED_MLFLOW = ("mlflow", "mlflow.densenet", "mlflow.densenet.svc")  # k8s/mlflow; the network policy allows it
_IMAGE = re.compile(r"(?P<name>[^@\s]+?)(?::(?P<tag>[\w][\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))")
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?")  # KubeRay appends to it, up to 63 characters
_OBJECT_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_QUANTITY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?[MGT]i?")


@dataclass(frozen=True)
class Settings:
    """Cluster settings that are not in the config; None: the overlay's value.

    `storage_class="default"` is the cluster's default class; `secret="none"` is for pods that need no credentials.
    """

    image: str
    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory: str | None = None
    storage_class: str | None = None
    stage_class: str | None = None
    secret: str | None = None
    namespace: str | None = None


def overlays() -> list[str]:
    """Returns the names of the overlays."""
    return sorted(folder.name for folder in (K8S / "overlays").iterdir() if (folder / "kustomization.yaml").is_file())


def render(path: Path, overrides: list[str], overlay: str, settings: Settings) -> str:
    """Renders the manifests of a training run as YAML for `kubectl apply -f`; the same input gives the same output.

    Raises:
        UserError: The overlay is unknown, the config does not fit its nodes or volumes, or a setting is wrong.
    """
    if overlay not in overlays():
        raise UserError(f"--overlay={overlay} is not known: use {', '.join(overlays())}.")
    image = _IMAGE.fullmatch(settings.image)
    if image is None or image["tag"] == "latest":
        raise UserError(f"--image={settings.image} needs a fixed tag, for example REPOSITORY:1.0, or a digest.")
    config = load_config(path, *overrides)
    check_model(config)
    name = str(config.run.name)
    if not _DNS_NAME.fullmatch(name):
        raise UserError(
            f"run.name={config.run.name} must be set, since retries resume the run of this name, and be a Kubernetes "
            f"object name: up to 47 lowercase letters, digits and hyphens."
        )
    _check_names(settings)
    documents = kustomize(K8S / "overlays" / overlay)
    (job,) = (document for document in documents if document["kind"] == "RayJob")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    _check_locations(config, container)
    job_patch: list[dict[str, Any]] = [{"op": "replace", "path": "/metadata/name", "value": name}]
    job_patch += _workers(config, overlay, group, container, settings) + _credentials(config, settings)
    volumes = len(group["template"]["spec"]["volumes"])
    more_patches, components = _volumes_and_network(config, overlay, documents, volumes, settings)
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "images": [
            {"name": "registry.example/densenet-pipeline", "newName": image["name"]}
            | ({"newTag": image["tag"]} if image["tag"] else {"digest": image["digest"]})
        ],
        "generatorOptions": {"disableNameSuffixHash": True},
        "configMapGenerator": [
            {
                "name": "training",
                "namespace": job["metadata"]["namespace"],
                "behavior": "replace",
                "files": ["train.yaml"],
            }
        ],
        "patches": [_patch("RayJob", job_patch), *more_patches],
    }
    if settings.namespace is not None:
        kustomization["namespace"] = settings.namespace
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        kustomization["resources"] = [os.path.relpath(K8S / "overlays" / overlay, root)]
        kustomization["components"] = [os.path.relpath(K8S / "components" / name, root) for name in components]
        (root / "kustomization.yaml").write_text(yaml.safe_dump(kustomization, sort_keys=False), encoding="utf-8")
        (root / "train.yaml").write_text(config.to_yaml(), encoding="utf-8")
        return kustomize_yaml(root)


def _workers(
    config: RunConfig, overlay: str, group: dict[str, Any], container: dict[str, Any], settings: Settings
) -> list[dict[str, Any]]:
    """Returns patches for the number of worker pods and their resources, after the checks of `densenet plan`."""
    limits = dict(container["resources"]["limits"])
    gpus = settings.gpus_per_node or int(limits.get(_GPU, 0))
    if settings.gpus_per_node and _GPU not in limits:
        raise UserError(f"--overlay={overlay} has nodes without GPUs: omit gpus-per-node, or use another overlay.")
    cpus = settings.cpus_per_node or int(limits["cpu"])
    requested = config.cluster.workers
    per_pod = gpus or (cpus if config.cluster.cpus_per_worker == "auto" else cpus // config.cluster.cpus_per_worker)
    if isinstance(requested, Elastic):
        if settings.nodes is not None:
            raise UserError("--set nodes is for a fixed number of workers: omit it, cluster.workers sets min and max.")
        low, high = (_pods(count, per_pod, gpus) for count in (requested.min, requested.max))
    else:
        low = high = settings.nodes or (group["replicas"] if requested == "auto" else _pods(requested, per_pod, gpus))
    available = Resources(f"overlay {overlay} with {high} worker pods", cpus * high, gpus * high, embedded=False)
    try:
        allocation = allocate(config, available)
        split_batch(config, allocation.workers)
    except InsufficientResources as error:
        raise UserError(f"{error.reason}.") from error
    if gpus and requested != "auto" and not isinstance(requested, Elastic) and requested != gpus * high:
        raise UserError(
            f"cluster.workers={requested} must be {gpus * high}: one worker per GPU on {high} nodes with {gpus} GPUs."
        )
    resources = {"cpu": str(cpus), "memory": settings.memory or limits["memory"]}
    if gpus:
        resources[_GPU] = str(gpus)
    path = f"{_GROUP}/template/spec/containers/0/resources"
    counts = {"replicas": low, "minReplicas": low, "maxReplicas": high}
    return [{"op": "replace", "path": f"{_GROUP}/{key}", "value": count} for key, count in counts.items()] + [
        {"op": "replace", "path": path, "value": {"requests": resources, "limits": resources}}
    ]


def _credentials(config: RunConfig, settings: Settings) -> list[dict[str, Any]]:
    """Returns patches for the Secret whose keys are environment variables of the pods."""
    for key, mark, location in locations(config):
        if mark.kind != "store" and is_remote(location) and settings.secret is None:
            raise UserError(
                f"{key}={location} needs credentials: use --set secret=NAME of a Secret (k8s/secrets.example.yaml), or "
                f"--set secret=none if the pods' service account has the permissions."
            )
    if settings.secret is None:
        return []
    sources = [] if settings.secret == "none" else [{"secretRef": {"name": settings.secret}}]
    head = "/spec/rayClusterSpec/headGroupSpec"
    return [
        {"op": "replace", "path": f"{pods}/template/spec/containers/0/envFrom", "value": sources}
        for pods in (head, _GROUP)
    ]


def _volumes_and_network(
    config: RunConfig, overlay: str, documents: list[dict[str, Any]], volumes: int, settings: Settings
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns kustomize patches and components for volumes and the network policy.

    `volumes` is the number of volumes in the overlay's worker pods.
    """
    patches, components = [], []
    claims = [document for document in documents if document["kind"] == "PersistentVolumeClaim"]
    shared = [claim["metadata"]["name"] for claim in claims if "ReadWriteMany" in claim["spec"]["accessModes"]]
    if shared and settings.storage_class is None:
        raise UserError(
            f"the volumes {' and '.join(shared)} of overlay {overlay} are read and written on several nodes: use --set "
            f"storage-class=NAME of a class with ReadWriteMany (kubectl get storageclass), or storage-class=default "
            f"if the cluster's default class has it."
        )
    if settings.storage_class not in (None, "default"):
        claim_patch = [{"op": "add", "path": "/spec/storageClassName", "value": settings.storage_class}]
        patches.append(_patch("PersistentVolumeClaim", claim_patch))
    if config.data.stage is not None:
        if not Path(config.data.stage).is_relative_to(_STAGE):
            raise UserError(f"data.stage={config.data.stage} must be below {_STAGE}, the node's local disk.")
        if settings.stage_class is None:
            raise UserError(
                f"data.stage={config.data.stage} needs a local disk on each node: use --set stage-class=NAME of a "
                f"class of node-local volumes (kubectl get storageclass)."
            )
        components.append("stage")
        path = f"{_GROUP}/template/spec/volumes/{volumes}/ephemeral/volumeClaimTemplate/spec/storageClassName"
        patches.append(_patch("RayJob", [{"op": "replace", "path": path, "value": settings.stage_class}]))
    elif settings.stage_class is not None:
        raise UserError(f"--set stage-class needs data.stage={_STAGE}, which is not set.")
    ports = _mlflow_ports(config)
    if ports:
        components.append("existing-mlflow")
        policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
        (rules,) = [policy["spec"]["egress"] for policy in policies if policy["metadata"]["name"] == "training"]
        path = f"/spec/egress/{len(rules)}/ports"
        operations = [{"op": "replace", "path": path, "value": [{"port": port} for port in ports]}]
        patches.append(_patch("NetworkPolicy", operations, name="training"))
    return patches, components


def _mlflow_ports(config: RunConfig) -> list[int]:
    """Returns the ports of the tracking and registry servers, without the bundled one (k8s/mlflow)."""
    servers = [urlsplit(uri or "") for uri in (config.tracking.uri, config.tracking.registry_uri)]
    return sorted(
        {
            server.port or {"http": 80, "https": 443}[server.scheme]
            for server in servers
            if server.scheme in ("http", "https") and server.hostname not in _BUNDLED_MLFLOW
        }
    )


def _patch(kind: str, operations: list[dict[str, Any]], **target: str) -> dict[str, Any]:
    return {"target": {"kind": kind} | target, "patch": yaml.safe_dump(operations)}


def _check_names(settings: Settings) -> None:
    for key in ("storage_class", "stage_class", "secret", "namespace"):
        value = getattr(settings, key)
        if value is not None and not _OBJECT_NAME.fullmatch(value):
            raise UserError(
                f"--set {key.replace('_', '-')}={value} is not a Kubernetes object name: use lowercase letters, "
                f"digits, hyphens and dots."
            )
    if settings.memory is not None and not _QUANTITY.fullmatch(settings.memory):
        raise UserError(f"--set memory={settings.memory} is not an amount of memory: use for example 200Gi.")


def _pods(workers: int, per_pod: int, gpus: int) -> int:
    """Returns the number of pods for the workers; on GPUs, workers must fill whole nodes."""
    if gpus and workers % gpus:
        raise UserError(
            f"cluster.workers={workers} does not fill nodes with {gpus} GPUs each: use a multiple of {gpus}, or set "
            f"gpus-per-node."
        )
    return max(1, -(-workers // max(1, per_pod)))


def _check_locations(config: RunConfig, container: dict[str, Any]) -> None:
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    if config.data.root is None:
        raise UserError("data.root is not set: set its path in the pods, below /data or /runs.")
    for key, mark, location in locations(config):
        if mark.kind not in ("input", "output") or is_uri(location):
            continue
        shared = [mount for at, mount in mounts.items() if Path(location).is_relative_to(at) and at not in _POD_MOUNTS]
        if not shared or (mark.kind == "output" and shared[0].get("readOnly")):
            volume = "/runs" if mark.kind == "output" else "/data"
            raise UserError(f"{key}={location} must be below {volume}, a volume that all pods share.")
