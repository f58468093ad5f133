"""Models of KubeRay and Kueue act on rendered runs: re-applied files, two runs, queues, node drains."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from launch.kubernetes.manifests import overlays
from tests.conftest import PROJECT
from tests.launch.kubernetes.kube_api import kube_api, path_of
from tests.launch.kubernetes.operators import (
    kuberay_update,
    kueue_admit,
    kueue_create,
    kueue_flavors,
    pod_templates,
    selects,
    tolerates,
)
from tests.launch.kubernetes.test_manifests import IMAGE, command_of, job_of, render

__all__ = ["render"]
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"


def nested(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nested(item)


@pytest.mark.parametrize("overlay", overlays())
def test_two_runs_share_no_object_and_select_only_their_own_pods(render, overlay):
    first, second = render(overlay), render(overlay, name="second")
    names = [{(document["kind"], document["metadata"]["name"]) for document in run} for run in (first, second)]
    assert not names[0] & names[1]
    labels = [template["metadata"]["labels"] for _, template in pod_templates(job_of(second)).values()]
    own = [template["metadata"]["labels"] for _, template in pod_templates(job_of(first)).values()]
    selectors = [value for value in nested(first) if "matchLabels" in value]
    assert len(selectors) >= 6
    for selector in selectors:
        assert not any(selects(selector, pod) for pod in labels), selector
    (policy,) = [document["spec"] for document in first if document["kind"] == "NetworkPolicy"]
    assert all(selects(policy["podSelector"], pod) for pod in own)
    for _, template in list(pod_templates(job_of(first)).values())[1:]:
        (volume,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "config"]
        assert volume["configMap"]["name"] == "first"


@pytest.mark.parametrize("overlay", overlays())
def test_kuberay_changes_nothing_that_the_file_sets(render, overlay):
    """Else each server-side apply would conflict with the operator, and each client-side apply change the job."""
    job = job_of(render(overlay))
    assert kuberay_update(job)["spec"] == job["spec"]
    assert "suspend" not in job["spec"]


def test_a_client_side_apply_leaves_suspend_to_kueue(render):
    """Without the key in the file, no apply resumes a waiting job or suspends a running one."""
    job = job_of(render("kueue"))
    assert kueue_create(job)["spec"]["suspend"]
    assert "suspend" not in job["spec"]


def test_only_the_autoscaler_has_an_api_token(render):
    documents = render("spot")
    cluster = job_of(documents)["spec"]["rayClusterSpec"]
    (mount,) = cluster["autoscalerOptions"]["volumeMounts"]
    assert (mount["mountPath"], mount["readOnly"]) == (TOKEN, True)
    head = cluster["headGroupSpec"]["template"]["spec"]
    (volume,) = [volume for volume in head["volumes"] if volume["name"] == mount["name"]]
    sources = {key: value for source in volume["projected"]["sources"] for key, value in source.items()}
    assert sources["serviceAccountToken"]["path"] == "token"
    assert sources["configMap"]["name"] == "kube-root-ca.crt"
    assert sources["downwardAPI"]["items"][0]["path"] == "namespace"
    for _, template in pod_templates(job_of(documents)).values():
        assert template["spec"]["automountServiceAccountToken"] is False
        for container in template["spec"]["containers"]:
            assert mount["name"] not in [mounted["name"] for mounted in container["volumeMounts"]]
    (policy,) = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    assert {443, 6443} <= {port["port"] for rule in policy["egress"] if "to" not in rule for port in rule["ports"]}


@pytest.mark.parametrize("overlay", overlays())
def test_the_operator_and_prometheus_reach_the_head_and_a_lost_head_is_replaced(render, overlay):
    documents = render(overlay)
    (policy,) = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    allowed = {
        (key, value, port["port"])
        for rule in policy["ingress"]
        for peer in rule["from"]
        for key, value in peer["podSelector"]["matchLabels"].items()
        for port in rule.get("ports", [])
    }
    assert allowed == {
        ("app.kubernetes.io/component", "kuberay-operator", 8265),
        ("app.kubernetes.io/name", "prometheus", 8080),
    }
    _, head = pod_templates(job_of(documents))["head"]
    for key in ("unreachable", "not-ready"):
        assert tolerates(head["spec"], {"key": f"node.kubernetes.io/{key}", "effect": "NoExecute"})
    assert {toleration["tolerationSeconds"] for toleration in head["spec"]["tolerations"]} == {30}
    (budget,) = [document["spec"] for document in documents if document["kind"] == "PodDisruptionBudget"]
    assert (budget["minAvailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")
    assert "maxUnavailable" not in budget


def test_kueue_admits_a_run_whose_queue_was_rendered_with_its_config(render):
    def admitted(job: dict[str, Any], queues: list[dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
        (queue,) = [document for document in queues if document["kind"] == "ClusterQueue"]
        return kueue_flavors(job, queue, [document for document in queues if document["kind"] == "ResourceFlavor"])

    small, large = (), ("cluster.workers=64", "train.global_batch_size=1024")
    jobs = {words: job_of(render("kueue", *words)) for words in (small, large)}
    queues = {words: render("kueue", "--part=cluster", *words) for words in (small, large)}
    flavors = admitted(jobs[small], queues[small])
    assert {name: flavor["metadata"]["name"] for name, flavor in flavors.items()} == {
        "submitter": "cpu-nodes",
        "head": "cpu-nodes",
        "workers": "gpu-nodes",
    }
    assert admitted(jobs[large], queues[small]) is None
    assert admitted(jobs[large], queues[large]) is not None


def test_the_run_names_what_its_queue_must_have(densenet):
    code, printed = densenet("k8s", "render", *command_of("kueue"))
    assert code == 0
    assert (
        "# Kueue admits the run if its queue has cpu 2250m, ephemeral-storage 21Gi, memory 8704Mi on cpu-nodes; "
        "cpu 256, ephemeral-storage 80Gi, memory 1600Gi, nvidia.com/gpu 32 on gpu-nodes."
    ) in printed


@pytest.fixture
def differences(tmp_path, monkeypatch):
    """`differences(address, overlay, image)` runs `densenet k8s diff`; returns exit code, stdout and stderr."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))

    def run(address: str, overlay: str, image: str = IMAGE) -> tuple[int, str, str]:
        parts = {"clusters": ("cluster", {"server": address}), "users": ("user", {})}
        parts["contexts"] = ("context", {"cluster": "local", "user": "local"})
        config = {key: [{"name": "local", name: value}] for key, (name, value) in parts.items()}
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump({"kind": "Config", "current-context": "local"} | config))
        words = ["k8s", "diff", *command_of(overlay)[:-1], image]
        program = [sys.executable, "-c", "import sys; from launch.cli import main; sys.exit(main())"]
        done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True, cwd=PROJECT)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("overlay", ["local-cpu", "kueue"])
def test_diff_shows_the_changes_of_apply_but_not_those_of_the_operators(differences, render, overlay):
    documents = render(overlay)
    queues = render(overlay, "--part=cluster")
    with kube_api(documents) as (address, objects):
        code, printed, _ = differences(address, overlay)
        assert code == 1
        assert all(f"+++ {document['kind']}/first (applied)" in printed for document in documents)
        for document in documents:
            objects[path_of(document)] = document
        job = job_of(documents)
        path = path_of(job)
        objects[path] = kuberay_update(job)
        del objects[path]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["scaleStrategy"]  # an older operator
        states = [kuberay_update(job), objects[path]]
        if overlay == "kueue":
            (queue,) = [document for document in queues if document["kind"] == "ClusterQueue"]
            flavors = [document for document in queues if document["kind"] == "ResourceFlavor"]
            waiting = kuberay_update(kueue_create(job))
            states += [waiting, kueue_admit(waiting, queue, flavors)]
        for state in states:
            objects[path] = state
            assert differences(address, overlay) == (0, "", "")
        code, printed, _ = differences(address, overlay, "registry.test/densenet:1.2.4")
        assert code == 1
        lines = [line for line in printed.splitlines() if line[:2] in ("- ", "+ ")]
        changed = {line[0] + line[1:].strip().removeprefix("- ") for line in lines}
        assert changed == {"-image: registry.test/densenet:1.2.3", "+image: registry.test/densenet:1.2.4"}


def test_diff_fails_with_the_servers_reason(differences, render):
    with kube_api(render("local-cpu")) as (address, _):
        pass
    code, _, printed = differences(address, "local-cpu")
    assert code == 2
    assert "kubectl diff failed" in printed and "kubectl config current-context" in printed
    assert "connection refused" in printed or "was refused" in printed
