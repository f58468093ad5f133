"""Kubernetes manifests, rendered from a config on an overlay of `k8s/`."""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from launch.cluster.allocation import InsufficientResources, Resources, allocate
from launch.kubernetes.kubectl import kustomize, kustomized
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
_PRIVATE = ("/tmp", "/dev/shm", "/etc/densenet")  # mounts that pods do not share
_STAGE = "/stage"  # the mount of the component `stage`
_OWN_MLFLOW = ("mlflow", "mlflow.densenet", "mlflow.densenet.svc")  # k8s/mlflow, which the network policy knows
_IMAGE = re.compile(r"(?P<name>[^@\s]+?)(?::(?P<tag>[\w][\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))")
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?")  # KubeRay adds to it, and 63 characters are allowed
_OBJECT_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_QUANTITY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?[MGT]i?")


@dataclass(frozen=True)
class Settings:
    """What a cluster needs to be told besides the config; None: as in the overlay.

    `storage_class` may be `default` for the cluster's own, `secret` may be `none` where pods need no credentials.
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
    """The names of the overlays that there are."""
    return sorted(folder.name for folder in (K8S / "overlays").iterdir() if (folder / "kustomization.yaml").is_file())


def render(path: Path, overrides: list[str], overlay: str, settings: Settings) -> str:
    """The manifests of a training, as YAML that `kubectl apply -f` takes; the same for the same input.

    Raises:
        UserError: the overlay is not known, the config does not fit its nodes or volumes, or a setting is wrong.
    """
    if overlay not in overlays():
        raise UserError(f"--overlay={overlay} is not known: use {', '.join(overlays())}.")
    image = _IMAGE.fullmatch(settings.image)
    if image is None or image["tag"] == "latest":
        raise UserError(f"--image={settings.image} needs a tag that stays the same, as REPOSITORY:1.0, or a digest.")
    config = load_config(path, *overrides)
    check_model(config)
    name = str(config.run.name)
    if not _DNS_NAME.fullmatch(name):
        raise UserError(
            f"run.name={config.run.name} must be set, by which retries go on, and be the name of an object too: up to "
            f"47 small letters, digits and hyphens."
        )
    _check_names(settings)
    documents = kustomize(K8S / "overlays" / overlay)
    (job,) = (document for document in documents if document["kind"] == "RayJob")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    _check_locations(config, container)
    of_job: list[dict[str, Any]] = [{"op": "replace", "path": "/metadata/name", "value": name}]
    of_job += _workers(config, overlay, group, container, settings) + _credentials(config, settings)
    more, components = _surroundings(config, overlay, documents, len(group["template"]["spec"]["volumes"]), settings)
    tree: dict[str, Any] = {
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
        "patches": [_patch("RayJob", of_job), *more],
    }
    if settings.namespace is not None:
        tree["namespace"] = settings.namespace
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder).resolve()
        tree["resources"] = [os.path.relpath(K8S / "overlays" / overlay, here)]
        tree["components"] = [os.path.relpath(K8S / "components" / component, here) for component in components]
        (here / "kustomization.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        (here / "train.yaml").write_text(config.to_yaml(), encoding="utf-8")
        return kustomized(here)


def _workers(
    config: RunConfig, overlay: str, group: dict[str, Any], container: dict[str, Any], settings: Settings
) -> list[dict[str, Any]]:
    """Patches for the number of pods and what each has, after the checks that `densenet plan` makes."""
    limits = dict(container["resources"]["limits"])
    gpus = settings.gpus_per_node or int(limits.get(_GPU, 0))
    if settings.gpus_per_node and _GPU not in limits:
        raise UserError(f"--overlay={overlay} has nodes without GPUs: leave gpus-per-node out, or use another overlay.")
    cpus = settings.cpus_per_node or int(limits["cpu"])
    wanted = config.cluster.workers
    per_pod = gpus or (cpus if config.cluster.cpus_per_worker == "auto" else cpus // config.cluster.cpus_per_worker)
    if isinstance(wanted, Elastic):
        if settings.nodes is not None:
            raise UserError("--set nodes is for a fixed number of workers: cluster.workers has min and max.")
        low, high = (_pods(count, per_pod, gpus) for count in (wanted.min, wanted.max))
    else:
        low = high = settings.nodes or (group["replicas"] if wanted == "auto" else _pods(wanted, per_pod, gpus))
    offered = Resources(f"overlay {overlay} with {high} pods of workers", cpus * high, gpus * high, embedded=False)
    try:
        taken = allocate(config, offered)
        split_batch(config, taken.workers)
    except InsufficientResources as error:
        raise UserError(f"{error.why}.") from error
    if gpus and wanted != "auto" and not isinstance(wanted, Elastic) and wanted != gpus * high:
        raise UserError(f"cluster.workers={wanted}, and {high} nodes with {gpus} GPUs each are {gpus * high} workers.")
    resources = {"cpu": str(cpus), "memory": settings.memory or limits["memory"]}
    if gpus:
        resources[_GPU] = str(gpus)
    place = f"{_GROUP}/template/spec/containers/0/resources"
    counts = {"replicas": low, "minReplicas": low, "maxReplicas": high}
    return [{"op": "replace", "path": f"{_GROUP}/{key}", "value": count} for key, count in counts.items()] + [
        {"op": "replace", "path": place, "value": {"requests": resources, "limits": resources}}
    ]


def _credentials(config: RunConfig, settings: Settings) -> list[dict[str, Any]]:
    """Patches for the Secret whose keys are variables of the pods."""
    for key, mark, place in locations(config):
        if mark.kind != "store" and is_remote(place) and settings.secret is None:
            raise UserError(
                f"{key}={place} needs credentials: --set secret=NAME of a Secret with them (k8s/secrets.example.yaml), "
                f"or --set secret=none where the pods' service account has the rights."
            )
    if settings.secret is None:
        return []
    sources = [] if settings.secret == "none" else [{"secretRef": {"name": settings.secret}}]
    head = "/spec/rayClusterSpec/headGroupSpec"
    return [
        {"op": "replace", "path": f"{pods}/template/spec/containers/0/envFrom", "value": sources}
        for pods in (head, _GROUP)
    ]


def _surroundings(
    config: RunConfig, overlay: str, documents: list[dict[str, Any]], volumes: int, settings: Settings
) -> tuple[list[dict[str, Any]], list[str]]:
    """Patches of kustomize, and components, for volumes and for who is reached over the network.

    `volumes` is how many the pods of workers have already.
    """
    patches, components = [], []
    claims = [document for document in documents if document["kind"] == "PersistentVolumeClaim"]
    shared = [claim["metadata"]["name"] for claim in claims if "ReadWriteMany" in claim["spec"]["accessModes"]]
    if shared and settings.storage_class is None:
        raise UserError(
            f"the volumes {' and '.join(shared)} of overlay {overlay} are read and written on several nodes: --set "
            f"storage-class=NAME of a class that offers ReadWriteMany (kubectl get storageclass), or "
            f"storage-class=default where the cluster's default does."
        )
    if settings.storage_class not in (None, "default"):
        of_claim = [{"op": "add", "path": "/spec/storageClassName", "value": settings.storage_class}]
        patches.append(_patch("PersistentVolumeClaim", of_claim))
    if config.data.stage is not None:
        if not Path(config.data.stage).is_relative_to(_STAGE):
            raise UserError(f"data.stage={config.data.stage} is on no disk of a node's own: {_STAGE} is.")
        if settings.stage_class is None:
            raise UserError(
                f"data.stage={config.data.stage} needs a disk on each node: --set stage-class=NAME of a storage class "
                f"of node-local volumes (kubectl get storageclass)."
            )
        components.append("stage")
        at = f"{_GROUP}/template/spec/volumes/{volumes}/ephemeral/volumeClaimTemplate/spec/storageClassName"
        patches.append(_patch("RayJob", [{"op": "replace", "path": at, "value": settings.stage_class}]))
    elif settings.stage_class is not None:
        raise UserError(f"--set stage-class is for data.stage={_STAGE}, which is not set.")
    ports = _mlflow_ports(config)
    if ports:
        components.append("existing-mlflow")
        policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
        (rules,) = [policy["spec"]["egress"] for policy in policies if policy["metadata"]["name"] == "training"]
        at = f"/spec/egress/{len(rules)}/ports"
        operations = [{"op": "replace", "path": at, "value": [{"port": port} for port in ports]}]
        patches.append(_patch("NetworkPolicy", operations, name="training"))
    return patches, components


def _mlflow_ports(config: RunConfig) -> list[int]:
    """The ports of tracking and registry servers that are not the one beside the trainings."""
    servers = [urlsplit(uri or "") for uri in (config.tracking.uri, config.tracking.registry_uri)]
    return sorted(
        {
            server.port or {"http": 80, "https": 443}[server.scheme]
            for server in servers
            if server.scheme in ("http", "https") and server.hostname not in _OWN_MLFLOW
        }
    )


def _patch(kind: str, operations: list[dict[str, Any]], **target: str) -> dict[str, Any]:
    return {"target": {"kind": kind} | target, "patch": yaml.safe_dump(operations)}


def _check_names(settings: Settings) -> None:
    for key in ("storage_class", "stage_class", "secret", "namespace"):
        value = getattr(settings, key)
        if value is not None and not _OBJECT_NAME.fullmatch(value):
            raise UserError(
                f"--set {key.replace('_', '-')}={value} is no name of an object: use small letters, digits, hyphens "
                f"and dots."
            )
    if settings.memory is not None and not _QUANTITY.fullmatch(settings.memory):
        raise UserError(f"--set memory={settings.memory} is no amount of memory: use for example 200Gi.")


def _pods(workers: int, per_pod: int, gpus: int) -> int:
    """Pods for so many workers; whole nodes where these have GPUs."""
    if gpus and workers % gpus:
        raise UserError(
            f"cluster.workers={workers} does not fill nodes with {gpus} GPUs each: use a multiple of {gpus}, or set "
            f"gpus-per-node."
        )
    return max(1, -(-workers // max(1, per_pod)))


def _check_locations(config: RunConfig, container: dict[str, Any]) -> None:
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    if config.data.root is None:
        raise UserError("data.root is not set: give its place in the pods, below /data or /runs.")
    for key, mark, place in locations(config):
        if mark.kind not in ("input", "output") or is_uri(place):
            continue
        on = [mount for at, mount in mounts.items() if Path(place).is_relative_to(at) and at not in _PRIVATE]
        if not on or (mark.kind == "output" and on[0].get("readOnly")):
            shared = "/runs" if mark.kind == "output" else "/data"
            raise UserError(f"{key}={place} is on no volume that all pods share: {shared} is.")
