"""What applying manifests would change in a cluster, without what KubeRay and Kueue have written there themselves."""

import difflib
import os
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import yaml

from launch.kubernetes.kubectl import kubectl
from launch.kubernetes.manifests import to_yaml
from launch.kubernetes.queues import QUEUE
from pipeline.errors import UserError

_CONTEXT = 10**6  # lines: each object of kubectl's output is complete
_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
_METADATA = ("creationTimestamp", "generation", "managedFields", "resourceVersion", "uid")
_KUEUE = "kueue.x-k8s.io/"
_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def changes(manifests: str) -> str:
    """Returns what `kubectl apply` would change in the cluster of kubectl's context, as a unified diff.

    Raises:
        UserError: The cluster is unreachable, or refuses the request.
    """
    env = os.environ | {"KUBECTL_EXTERNAL_DIFF": f"diff -N -r -U{_CONTEXT}"}
    done = subprocess.run([kubectl(), "diff", "-f", "-"], input=manifests, capture_output=True, text=True, env=env)
    if done.returncode > 1:
        raise UserError(
            f"kubectl diff failed: {done.stderr.strip()}\nTo see the cluster: kubectl config current-context."
        )
    return "".join(_difference(live, applied) for live, applied in _objects(done.stdout))


def _objects(output: str) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """Yields each object that differs, as it is and as it would be, from a unified diff with complete context."""
    lines = iter(re.findall(r"[^\n]*\n", output))
    for line in lines:
        if match := _HUNK.match(line):
            before, after = (int(count or 1) for count in match.groups())
            sides: tuple[list[str], list[str]] = ([], [])
            while before or after:
                line = next(lines)
                if line[0] in " -":
                    sides[0].append(line[1:])
                    before -= 1
                if line[0] in " +":
                    sides[1].append(line[1:])
                    after -= 1
            yield yaml.safe_load("".join(sides[0])), yaml.safe_load("".join(sides[1]))


def _difference(live: dict[str, Any] | None, applied: dict[str, Any] | None) -> str:
    """Returns the unified diff of an object as it is and as it would be, without the operators' own changes."""
    _remove_operators_changes(live, applied)
    before, after = (to_yaml([value], sort_keys=True).splitlines() if value else [] for value in (live, applied))
    some = applied or live or {}
    name = f"{some['kind']}/{some['metadata']['name']}"
    lines = difflib.unified_diff(before, after, f"{name} (cluster)", f"{name} (applied)", lineterm="")
    return "".join(f"{line}\n" for line in lines)


def _remove_operators_changes(live: dict[str, Any] | None, applied: dict[str, Any] | None) -> None:
    for value in (live, applied):
        if value is not None:
            for key in _METADATA:
                value["metadata"].pop(key, None)
            _remove_keys(value["metadata"], "annotations", _APPLIED)
    if live is None or applied is None or applied["kind"] != "RayJob":
        return
    is_queued = QUEUE in applied["metadata"].get("labels", {})
    for job in (live, applied):
        job.pop("status", None)
        if is_queued or not job["spec"].get("suspend"):
            job["spec"].pop("suspend", None)  # KubeRay omits false, Kueue sets it
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
            group.setdefault("scaleStrategy", {})  # KubeRay adds it
    if is_queued:
        for before, after in zip(_templates(live), _templates(applied), strict=False):
            _remove_kueues_changes(before, after)


def _templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the pod templates of a RayJob."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]


def _remove_kueues_changes(live: dict[str, Any], applied: dict[str, Any]) -> None:
    """Removes what Kueue adds to a pod template when it admits a job: its labels, and the flavor's node selector."""
    for template in (live, applied):
        for key in ("labels", "annotations"):
            _remove_keys(template["metadata"], key, _KUEUE)
    spec, own = live["spec"], applied["spec"]
    selector = {key: value for key, value in spec.pop("nodeSelector", {}).items() if key in own.get("nodeSelector", {})}
    tolerations = [value for value in spec.pop("tolerations", []) if value in own.get("tolerations", [])]
    spec |= {key: value for key, value in (("nodeSelector", selector), ("tolerations", tolerations)) if value}
    spec.pop("schedulingGates", None)


def _remove_keys(metadata: dict[str, Any], name: str, prefix: str) -> None:
    """Removes the keys with a prefix from labels or annotations."""
    left = {key: value for key, value in metadata.pop(name, {}).items() if not key.startswith(prefix)}
    if left:
        metadata[name] = left
