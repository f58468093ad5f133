"""Renders Kubernetes manifests from a config and an overlay of `k8s/`."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from launch.kubernetes.kubectl import K8S, kustomize
from launch.kubernetes.pods import fit_pods
from launch.kubernetes.queues import QUEUE, format_requests, raise_quotas, requests_by_flavor
from launch.kubernetes.settings import Settings, check_image, parse_settings
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.errors import UserError
from pipeline.model.timm_models import check_model

PARTS = ("cluster", "namespace", "run")
_INSTANCE = "app.kubernetes.io/instance"  # the label with the run's name
_IMAGE = "registry.example/densenet-pipeline"  # of the base
_BUNDLED_MLFLOW = ("mlflow", "mlflow.densenet", "mlflow.densenet.svc")  # k8s/mlflow; the network policy allows it
_RUN_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")  # RFC 1035; KubeRay appends to it, up to 63 characters
_FastDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def overlays() -> list[str]:
    """Returns the names of the overlays."""
    return sorted(folder.name for folder in (K8S / "overlays").iterdir() if (folder / "kustomization.yaml").is_file())


def render(path: Path, overrides: list[str], overlay: str, part: str, image: str | None, words: list[str]) -> str:
    """Renders one part of the manifests as YAML for `kubectl apply -f`; the same input gives the same output.

    Args:
        path: A config file, or the name of a built-in config.
        overrides: `key=value` on top of the config.
        overlay: One of `overlays()`.
        part: `run` for the objects of one run; `namespace` for those that the runs of a namespace share; `cluster` for
            the namespace and objects outside of namespaces.
        image: The pods' image; the parts `namespace` and `cluster` need none.
        words: Cluster settings, `KEY=VALUE` (`launch/kubernetes/settings.py`).

    Raises:
        UserError: The overlay or part is unknown, the config does not fit its nodes or volumes, or a setting is wrong.
    """
    for option, value, known in (("overlay", overlay, overlays()), ("part", part, PARTS)):
        if value not in known:
            raise UserError(f"--{option}={value} is not known: use {', '.join(known)}.")
    settings = parse_settings(words)
    config, defaults = _with_defaults(path, overrides, overlay)
    notes = [f"Part {part} of overlay {overlay}, written by `densenet k8s render`."]
    if part == "run":
        documents = _run(config, overlay, settings)
        _name_objects(documents, config)
        job = _find(documents, "RayJob")
        _set_image(job, check_image(image))
        notes += _origins(path, overrides, overlay, defaults, words, job)
    else:
        documents = kustomize(_part(part, overlay))
        for document in documents:
            if document["kind"] == "ClusterQueue":
                raise_quotas(document, _find(_run(config, overlay, settings), "RayJob"))
            elif document["kind"] == "PersistentVolumeClaim":
                _set_storage_class(document, overlay, settings)
    if settings.namespace is not None:
        _set_namespace(documents, settings.namespace)
    header = "".join(f"# {note}\n" for note in notes)
    return header + to_yaml(documents)


def to_yaml(documents: list[dict[str, Any]], sort_keys: bool = False) -> str:
    """Returns objects as YAML from which kubectl reads equal objects."""
    return str(yaml.dump_all(documents, Dumper=_Dumper, sort_keys=sort_keys, allow_unicode=True, width=2**20))


def _with_defaults(path: Path, overrides: list[str], overlay: str) -> tuple[RunConfig, dict[str, Any]]:
    """Returns the config, and the overlay's values of the keys that the config does not set."""
    own = load_config(path, *overrides)
    defaults: dict[str, dict[str, Any]] = {}
    for file in (K8S / "base" / "config.yaml", K8S / "overlays" / overlay / "config.yaml"):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for section, values in content.items():
            is_set = getattr(own, section).model_fields_set if section in own.model_fields_set else ()
            defaults.setdefault(section, {}).update({k: v for k, v in values.items() if k not in is_set})
    config = load_config({"include": str(path), **defaults}, *overrides)
    return config, {f"{section}.{key}": value for section, values in defaults.items() for key, value in values.items()}


def _run(config: RunConfig, overlay: str, settings: Settings) -> list[dict[str, Any]]:
    """Returns the objects of a run, fitted to the config, with the base's names."""
    check_model(config)
    components = ["stage"] if config.data.stage is not None else []
    documents = kustomize(K8S / "overlays" / overlay, components=components)
    policy = _find(documents, "NetworkPolicy")
    policy["spec"]["egress"] += _egress(config, settings)
    fit_pods(_find(documents, "RayJob"), config, overlay, settings)
    return [_config_map(config, policy["metadata"]), *documents]


def _part(part: str, overlay: str) -> Path:
    """Returns the kustomization of a part: the overlay's, or the common one."""
    own = K8S / "overlays" / overlay / part
    return own if own.is_dir() else K8S / part


def _find(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (document,) = (document for document in documents if document["kind"] == kind)
    return document


def _config_map(config: RunConfig, metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the ConfigMap with the training config, which the base's pods mount."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {key: metadata[key] for key in ("name", "namespace", "labels")},
        "data": {"train.yaml": config.to_yaml()},
    }


def _name_objects(documents: list[dict[str, Any]], config: RunConfig) -> None:
    """Names a run's objects, their labels and their references to each other after the run."""
    name = str(config.run.name)
    if not _RUN_NAME.fullmatch(name):
        raise UserError(
            f"run.name={config.run.name} must be set, since retries resume the run of this name, and be the name of a "
            f"RayJob: up to 47 lowercase letters, digits and hyphens, and a letter first."
        )
    kinds = {"Job", *(document["kind"] for document in documents)}  # KubeRay creates a Job of this name
    for other in kustomize(*(K8S / folder for folder in ("namespace", "mlflow", "data", "monitoring"))):
        if other["kind"] in kinds and other["metadata"]["name"] == name:
            raise UserError(f"run.name={name} is the name of another {other['kind']} of k8s/: choose another.")
    for document in documents:
        document["metadata"]["name"] = name
        document["metadata"]["labels"][_INSTANCE] = name
    for value in _dicts(documents):
        if _INSTANCE in value:
            value[_INSTANCE] = name
        if value.get("name") == "config" and "configMap" in value:
            value["configMap"]["name"] = name


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """Yields all dictionaries in nested lists and dictionaries."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _dicts(item)


def _set_image(job: dict[str, Any], image: str) -> None:
    for container in _dicts(job):
        if str(container.get("image")).startswith(_IMAGE):
            container["image"] = image


def _egress(config: RunConfig, settings: Settings) -> list[dict[str, Any]]:
    """Returns rules of the network policy for the config's MLflow servers and `--set egress`."""
    servers = [urlsplit(uri or "") for uri in (config.tracking.uri, config.tracking.registry_uri)]
    ports = {
        server.port or {"http": 80, "https": 443}[server.scheme]
        for server in servers
        if server.scheme in ("http", "https") and server.hostname not in _BUNDLED_MLFLOW
    }
    rules: list[dict[str, Any]] = [{"ports": [{"port": port} for port in sorted(ports)]}] if ports else []
    for block, port in settings.egress:
        protocols = ("UDP", "TCP") if port == 53 else ("TCP",)
        rule_ports = [{"port": port, "protocol": protocol} for protocol in protocols]
        rules.append({"to": [{"ipBlock": {"cidr": block}}], "ports": rule_ports})
    return rules


def _set_storage_class(claim: dict[str, Any], overlay: str, settings: Settings) -> None:
    name = claim["metadata"]["name"]
    if "ReadWriteMany" in claim["spec"]["accessModes"] and settings.storage_class is None:
        raise UserError(
            f"the volume {name} of overlay {overlay} is read and written on several nodes: use --set "
            f"storage-class=NAME of a class with ReadWriteMany (kubectl get storageclass), or storage-class=default if "
            f"the cluster's default class has it."
        )
    if settings.storage_class not in (None, "default"):
        claim["spec"]["storageClassName"] = settings.storage_class


def _set_namespace(documents: list[dict[str, Any]], namespace: str) -> None:
    for document in documents:
        if document["kind"] == "Namespace":
            document["metadata"]["name"] = namespace
        elif "namespace" in document["metadata"]:
            document["metadata"]["namespace"] = namespace


def _origins(
    path: Path, overrides: list[str], overlay: str, defaults: dict[str, Any], words: list[str], job: dict[str, Any]
) -> list[str]:
    """Returns lines that say which value comes from where."""
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    low, high = group["minReplicas"], group["maxReplicas"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    amounts = ", ".join(f"{name} {amount}" for name, amount in limits.items())
    command = [*overrides, *(f"--set={word}" for word in words)]
    overlay_values = " ".join(f"{key}={json.dumps(value)}" for key, value in defaults.items())
    notes = [
        f"Config: {path}, where it sets a key.",
        f"Overlay {overlay}: {overlay_values or 'no config key'}.",
        f"Command: {shlex.join(command) or 'no key'}.",
        f"Worker pods: {low if low == high else f'{low} to {high}'}, each with {amounts}.",
    ]
    if QUEUE in job["metadata"]["labels"]:
        requests = [f"{format_requests(total)} on {flavor}" for flavor, total in requests_by_flavor(job).items()]
        notes.append(f"Kueue admits the run if its queue has {'; '.join(requests)}.")
    return [note.replace("\n", "\\n") for note in notes]


class _Dumper(_FastDumper):  # type: ignore[misc, valid-type]
    """Writes texts of several lines as blocks, repeats equal parts, and quotes strings that may look like numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        """Returns True: no anchors."""
        return True


def _represent_text(dumper: Any, text: str) -> Any:
    is_plain = re.fullmatch(r"[A-Za-z/][\w./:-]*", text, re.ASCII) and isinstance(yaml.safe_load(text), str)
    style = "|" if "\n" in text else None if is_plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
