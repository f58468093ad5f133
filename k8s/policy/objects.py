"""Writes the objects of `k8s/` as a policy linter reads them: a RayJob's pod templates as Pods, a file per folder.

python k8s/policy/objects.py TARGET
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from launch.kubernetes.kubectl import kustomize
from launch.kubernetes.manifests import K8S


def main() -> None:
    """Writes one file for each overlay, and for MLflow and the data Job."""
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for folder in [*sorted((K8S / "overlays").iterdir()), K8S / "mlflow", K8S / "data"]:
        objects = [seen for document in kustomize(folder) for seen in as_seen(document)]
        (target / f"{folder.name}.yaml").write_text(yaml.safe_dump_all(objects), encoding="utf-8")


def as_seen(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An object as it is, or in a RayJob's place a Pod for each of its templates."""
    if document["kind"] != "RayJob":
        yield document
        return
    cluster = document["spec"]["rayClusterSpec"]
    templates = {"submitter": document["spec"]["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    for name, template in templates.items():
        metadata = {"name": name, "namespace": document["metadata"]["namespace"]} | template["metadata"]
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


if __name__ == "__main__":
    main()
