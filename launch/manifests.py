"""Kubernetes manifests: rendered from a config on an overlay of `k8s/`, and checked against schemas."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from launch.resources import NoRoom, Resources, share
from pipeline.config import DIGITS, Elastic, RunConfig
from pipeline.config_file import load_config
from pipeline.data.staging import is_remote
from pipeline.derived import split_batch
from pipeline.errors import UserError
from pipeline.model.densenet import check_name

K8S = Path(__file__).parents[1] / "k8s"
_GROUP = "/spec/rayClusterSpec/workerGroupSpecs/0"
_GPU = "nvidia.com/gpu"
_PRIVATE = ("/tmp", "/dev/shm", "/etc/densenet")  # mounts that pods do not share
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where there is libyaml
_IMAGE = re.compile(r"(?P<name>[^@\s]+?)(?::(?P<tag>[\w][\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))")
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?")  # KubeRay adds to it, and 63 characters are allowed


@dataclass(frozen=True)
class Settings:
    """What a cluster needs to be told besides the config; None: as in the overlay."""

    image: str
    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory: str | None = None
    storage_class: str | None = None
    secret: str | None = None
    namespace: str | None = None


def overlays() -> list[str]:
    """The names of the overlays that there are.

    Raises:
        UserError: this installation has no manifests.
    """
    if not K8S.is_dir():
        raise UserError(
            f"the manifests are not installed with the package: run this in a checkout, where {K8S.name}/ is."
        )
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
    config = load_config(path, overrides)
    check_name(config.model.name)
    (job,) = (document for document in kustomize(K8S / "overlays" / overlay) if document["kind"] == "RayJob")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    _check_places(config, container)
    name = str(config.run.name)
    if not _DNS_NAME.fullmatch(name):
        raise UserError(
            f"run.name={config.run.name} must be set, by which retries go on, and be the name of an object too: up to "
            f"47 small letters, digits and hyphens."
        )
    patches: list[dict[str, Any]] = [{"op": "replace", "path": "/metadata/name", "value": name}]
    patches += _workers(config, overlay, group, container, settings)
    if settings.secret is not None:
        head = "/spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/envFrom"
        for place in (head, f"{_GROUP}/template/spec/containers/0/envFrom"):
            patches.append({"op": "replace", "path": place, "value": [{"secretRef": {"name": settings.secret}}]})
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
        "patches": [{"target": {"kind": "RayJob"}, "patch": yaml.safe_dump(patches)}],
    }
    if settings.namespace is not None:
        tree["namespace"] = settings.namespace
    if settings.storage_class is not None:
        added = [{"op": "add", "path": "/spec/storageClassName", "value": settings.storage_class}]
        target: dict[str, Any] = {"target": {"kind": "PersistentVolumeClaim"}, "patch": yaml.safe_dump(added)}
        tree["patches"].append(target)
    with tempfile.TemporaryDirectory() as folder:
        tree["resources"] = [os.path.relpath(K8S / "overlays" / overlay, Path(folder).resolve())]
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        (Path(folder) / "train.yaml").write_text(config.to_yaml(), encoding="utf-8")
        return _kustomized(Path(folder))


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """The objects that a kustomization makes.

    Raises:
        UserError: it is wrong, or there is no kubectl.
    """
    return list(yaml.safe_load_all(_kustomized(folder)))


def kubectl() -> str:
    """The program.

    Raises:
        UserError: there is none.
    """
    found = shutil.which("kubectl") or shutil.which("kubectl", path=str(Path(sys.executable).parent))
    if found is None:
        raise UserError("there is no kubectl on this machine: install it, or this project's lock file.")
    return found


def validate(documents: list[dict[str, Any]], crds: Path | None) -> list[str]:
    """What is wrong with objects by their schemas, unknown fields included, one line each.

    Kubernetes' own kinds are checked by the schemas of `kubernetes-validate`, others by the definitions in the folder
    `crds` (as of `kubectl get crd rayjobs.ray.io -o yaml`).
    """
    known = _definitions(crds) if crds is not None else {}
    faults = []
    for document in documents:
        if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
            faults.append("a document is no Kubernetes object: it lacks apiVersion, kind or metadata")
            continue
        kind = f"{document['apiVersion']} {document['kind']}"
        name = f"{kind} {document['metadata'].get('name')}"
        schema = known.get((document["apiVersion"], document["kind"]))
        if schema is not None:
            found = jsonschema.Draft202012Validator(schema).iter_errors(document)
            faults += [f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]
            continue
        try:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            faults.append(f"{name}: {'.'.join(map(str, error.path))}: {error.message[:300]}")
        except kubernetes_validate.SchemaNotFoundError:
            group = document["apiVersion"].partition("/")[0]
            faults.append(
                f"{name}: there is no schema for {kind}: give --crds DIR with its definition, as of `kubectl get crd "
                f"{document['kind'].lower()}s.{group} -o yaml`"
            )
    return faults


def read_documents(files: list[Path]) -> list[dict[str, Any]]:
    """All objects in YAML files.

    Raises:
        UserError: a file cannot be read or is no YAML.
    """
    found = []
    for file in files:
        try:
            found += [document for document in yaml.load_all(file.read_text(encoding="utf-8"), _LOADER) if document]
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read as YAML: {error}") from error
    return found


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
        taken = share(config, offered)
        split_batch(config, taken.workers)
    except NoRoom as error:
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


def _pods(workers: int, per_pod: int, gpus: int) -> int:
    """Pods for so many workers; whole nodes where these have GPUs."""
    if gpus and workers % gpus:
        raise UserError(
            f"cluster.workers={workers} does not fill nodes with {gpus} GPUs each: use a multiple of {gpus}, or set "
            f"gpus-per-node."
        )
    return max(1, -(-workers // max(1, per_pod)))


def _check_places(config: RunConfig, container: dict[str, Any]) -> None:
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    places = {"data.root": config.data.root, "run.output": config.run.output}
    for key, place in places.items():
        if place is None:
            raise UserError(f"{key} is not set: give its place in the pods, below /data or /runs.")
        if key == "data.root" and (place == DIGITS or is_remote(place)):
            continue
        on = [mount for at, mount in mounts.items() if Path(place).is_relative_to(at) and at not in _PRIVATE]
        if not on or (key == "run.output" and on[0].get("readOnly")):
            raise UserError(
                f"{key}={place} is on no volume that all pods share: {'/runs' if key == 'run.output' else '/data'} is."
            )


def _kustomized(folder: Path) -> str:
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"kubectl kustomize refuses {folder}: {done.stderr.strip()}")
    return done.stdout


@lru_cache
def _definitions(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Schemas of custom kinds by apiVersion and kind, made strict."""
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not files:
        raise UserError(f"--crds={folder} holds no YAML files.")
    found = {}
    for document in read_documents(files):
        if document.get("kind") == "CustomResourceDefinition":
            spec = document["spec"]
            for version in spec["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


def _strict(schema: Any) -> Any:
    """The schema with unknown fields refused, and Kubernetes' extensions put in JSON Schema's words."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value) for key, value in schema.items()}
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = found.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in found
    if isinstance(found.get("properties"), dict) and found.get("type") == "object" and not open_ended:
        found["additionalProperties"] = False
    if found.get("nullable") and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    return found
