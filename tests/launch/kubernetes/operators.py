"""Small models of what KubeRay, Kueue and the scheduler do to objects; sources: KubeRay 1.7, Kueue 0.19."""

import copy
from fractions import Fraction
from typing import Any

from launch.kubernetes.quantities import parse_quantity

_OMITTED_IF_FALSE = ("suspend", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds")


def kuberay_update(job: dict[str, Any]) -> dict[str, Any]:
    """Returns a RayJob after KubeRay has added its finalizer: its Go types omit and add fields."""
    job = copy.deepcopy(job)
    job["metadata"]["finalizers"] = ["ray.io/rayjob-finalizer"]
    for key in _OMITTED_IF_FALSE:
        if not job["spec"].get(key, True):
            del job["spec"][key]
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        group.setdefault("scaleStrategy", {})
    return job


def kueue_create(job: dict[str, Any]) -> dict[str, Any]:
    """Returns a new RayJob after Kueue's webhook: suspended."""
    return {**copy.deepcopy(job), "spec": {**copy.deepcopy(job["spec"]), "suspend": True}}


def kueue_admit(job: dict[str, Any], queue: dict[str, Any], flavors: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a RayJob that Kueue has started: not suspended, with the labels and node selectors of its flavors."""
    job = copy.deepcopy(job)
    job["spec"].pop("suspend", None)
    assigned = kueue_flavors(job, queue, flavors)
    assert assigned is not None
    for name, (_, template) in pod_templates(job).items():
        template["metadata"]["labels"]["kueue.x-k8s.io/podset"] = name
        template["metadata"].setdefault("annotations", {})["kueue.x-k8s.io/workload"] = "rayjob-first-1a2b3"
        labels = assigned[name]["spec"].get("nodeLabels", {})
        if labels:
            template["spec"].setdefault("nodeSelector", {}).update(labels)
    return job


def kueue_flavors(
    job: dict[str, Any], queue: dict[str, Any], flavors: list[dict[str, Any]]
) -> dict[str, dict[str, Any]] | None:
    """Returns the flavor of each pod set if the whole job fits into an empty queue, else None: first flavor first."""
    kinds = {flavor["metadata"]["name"]: flavor for flavor in flavors}
    (group,) = queue["spec"]["resourceGroups"]
    quotas = {
        flavor["name"]: {r["name"]: parse_quantity(str(r["nominalQuota"])) for r in flavor["resources"]}
        for flavor in group["flavors"]
    }
    assigned = {}
    for name, (count, template) in pod_templates(job).items():
        requests: dict[str, Fraction] = {}
        for container in template["spec"]["containers"]:
            for resource, amount in container["resources"]["requests"].items():
                requests[resource] = requests.get(resource, Fraction()) + count * parse_quantity(amount)
        if not requests.keys() <= set(group["coveredResources"]):
            return None
        for flavor, quota in quotas.items():
            taints = kinds[flavor]["spec"].get("nodeTaints", []) if "spec" in kinds[flavor] else []
            tolerated = all(tolerates(template["spec"], taint) for taint in taints)
            if tolerated and all(quota[resource] >= amount for resource, amount in requests.items()):
                for resource, amount in requests.items():
                    quota[resource] -= amount
                assigned[name] = {"spec": {}} | kinds[flavor]
                break
        else:
            return None
    return assigned


def tolerates(pod: dict[str, Any], taint: dict[str, Any]) -> bool:
    """Returns whether a pod tolerates a taint."""
    return any(
        toleration.get("key") == taint["key"]
        and toleration.get("effect") in (None, taint["effect"])
        and (toleration.get("operator") == "Exists" or toleration.get("value") == taint.get("value"))
        for toleration in pod.get("tolerations", [])
    )


def pod_templates(job: dict[str, Any]) -> dict[str, tuple[int, dict[str, Any]]]:
    """Returns the number of pods and the pod template of each role."""
    cluster = job["spec"]["rayClusterSpec"]
    templates = {
        "submitter": (1, job["spec"]["submitterPodTemplate"]),
        "head": (1, cluster["headGroupSpec"]["template"]),
    }
    return templates | {g["groupName"]: (g["replicas"], g["template"]) for g in cluster["workerGroupSpecs"]}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Returns whether a label selector without expressions matches labels."""
    return selector.get("matchLabels", {}).items() <= labels.items()
