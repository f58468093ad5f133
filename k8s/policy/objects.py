"""Writes the objects of `k8s/` for a policy linter, one file per folder, with a RayJob's pod templates as Pods.

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
    """Writes a file for each overlay, MLflow, the monitoring and the data Job."""
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for folder in [*sorted((K8S / "overlays").iterdir()), K8S / "mlflow", K8S / "monitoring", K8S / "data"]:
        objects = [pod for document in kustomize(folder) for pod in with_pods(document)]
        (target / f"{folder.name}.yaml").write_text(yaml.safe_dump_all(objects), encoding="utf-8")


def with_pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Returns the object, or for a RayJob a Pod for each of its pod templates."""
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
