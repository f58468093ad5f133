"""Kubernetes manifests: every overlay is valid, keeps to the restricted pod security, and fits its config."""

import re
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import app
from launch.manifests import K8S, kustomize, overlays, validate
from pipeline.config_file import load_config
from tests.conftest import PROJECT

IMAGE = "registry.test/densenet:1.2.3"
CRDS = (PROJECT / ".." / "shared" / "k8s").resolve()
GPU = "nvidia.com/gpu"


def config_of(overlay: str) -> Path:
    """The config that an overlay has in its repository form."""
    own = K8S / "overlays" / overlay / "train.yaml"
    return own if own.is_file() else K8S / "base" / "train.yaml"


@pytest.fixture
def rendered(densenet) -> Callable[..., list[dict[str, Any]]]:
    """`rendered(overlay, *arguments)`: the objects of an overlay's own config."""

    def run(overlay: str, *arguments: object) -> list[dict[str, Any]]:
        given = ("k8s", "render", config_of(overlay), *arguments, "--overlay", overlay, "--image", IMAGE)
        code, printed = densenet(*given)
        assert code == 0, printed
        assert densenet(*given) == (0, printed), "not the same again"
        return list(yaml.safe_load_all(printed))

    return run


def job_of(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (job,) = [document for document in documents if document["kind"] == "RayJob"]
    return job


def pods(job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pod specs of a job, by what they are."""
    cluster = job["spec"]["rayClusterSpec"]
    yield "submitter", job["spec"]["submitterPodTemplate"]["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize("overlay", overlays())
def test_every_object_is_valid_as_it_lies_there_and_rendered(rendered, overlay):
    crds = CRDS if CRDS.is_dir() else None
    for documents in (kustomize(K8S / "overlays" / overlay), rendered(overlay)):
        faults = validate(documents, crds)
        if crds is None:
            faults = [fault for fault in faults if "there is no schema for" not in fault]
        assert faults == []


@pytest.mark.parametrize("folder", ["mlflow", "data"])
def test_what_stands_beside_a_training_is_valid_and_restricted(folder):
    documents = kustomize(K8S / folder)
    assert validate(documents, None) == []
    for document in documents:
        spec = document.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        pod = spec.get("template", {}).get("spec") if isinstance(spec, dict) else None
        if pod is None:
            continue
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert ":" in container["image"] and not container["image"].endswith(":latest")
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert not [e for e in container.get("env", []) if "PASSWORD" in e["name"] and "value" in e]


def test_the_image_has_this_projects_version_and_python():
    text = (K8S / "images" / "Dockerfile").read_text()
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert f'image.version="{project["version"]}"' in text
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-slim-bookworm$", text, re.MULTILINE)
    for overlay in overlays():
        for _, pod in pods(job_of(kustomize(K8S / "overlays" / overlay))):
            assert [c["image"].rpartition(":")[2] for c in pod["containers"]] == [project["version"]]


def test_unknown_fields_and_wrong_types_are_found_in_custom_kinds_too(rendered):
    if not CRDS.is_dir():
        pytest.skip("the definitions of KubeRay are not on this machine (../shared/k8s)")
    documents = rendered("local-cpu")
    job = job_of(documents)
    job["spec"]["backofLimit"] = 3
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "many"
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Never"
    faults = " ".join(validate(documents, CRDS))
    for word in ("backofLimit", "'many' is not of type 'integer'", "imagePulPolicy"):
        assert word in faults
    (claim, *_) = [document for document in documents if document["kind"] == "PersistentVolumeClaim"]
    claim["spec"]["acessModes"] = []
    assert "acessModes" in " ".join(validate([claim], None))
    assert "there is no schema for ray.io/v1 RayJob: give --crds DIR" in " ".join(validate([job], None))


@pytest.mark.parametrize("overlay", overlays())
def test_pods_keep_to_the_restricted_standard_and_say_what_they_need(rendered, overlay):
    documents = rendered(overlay)
    for what, pod in pods(job_of(documents)):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0, what
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["image"] == IMAGE
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"][
                "requests"
            ].keys()
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            if what != "submitter":
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    for _, pod in list(pods(job_of(documents)))[2:]:
        (hook,) = [c["lifecycle"]["preStop"]["exec"]["command"] for c in pod["containers"]]
        assert pod["terminationGracePeriodSeconds"] > int(hook[hook.index("--wait") + 1])
    (namespace,) = [document for document in documents if document["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("overlay", overlays())
def test_versions_and_the_entrypoint_are_this_projects(rendered, overlay, tmp_path):
    documents = rendered(overlay)
    job = job_of(documents)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")
    program, command, file = job["spec"]["entrypoint"].split()
    assert (program, command) == ("densenet", "train")
    assert any(info.name == command or info.callback.__name__ == command for info in app.registered_commands)
    (config,) = [document for document in documents if document["kind"] == "ConfigMap"]
    text = config["data"][Path(file).name]
    (tmp_path / "train.yaml").write_text(text)
    assert load_config(tmp_path / "train.yaml", []) == load_config(config_of(overlay), [])
    assert job["metadata"]["name"] == load_config(config_of(overlay), []).run.name


def test_workers_follow_the_config(rendered):
    group = job_of(rendered("multi-node", "cluster.workers=64"))["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (8, 8, 8)
    settings = ("--set", "gpus-per-node=4", "--set", "cpus-per-node=32", "--set", "memory=200Gi", "--set", "nodes=2")
    documents = rendered("multi-node", *settings, "--set", "storage-class=nfs", "--set", "secret=keys")
    group = job_of(documents)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["replicas"] == 2
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "32", "memory": "200Gi", GPU: "4"}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    claims = [document for document in documents if document["kind"] == "PersistentVolumeClaim"]
    assert {claim["spec"]["storageClassName"] for claim in claims} == {"nfs"}
    group = job_of(rendered("spot"))["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--overlay", "cloud"),
            "--overlay=cloud is not known: use kueue, local-cpu, multi-node",
        ),
        (("--image", "densenet"), "--image=densenet needs a tag that stays the same"),
        (("--image", "densenet:latest"), "--image=densenet:latest needs a tag that stays the same"),
        (("cluster.workers=12",), "cluster.workers=12 does not fill nodes with 8 GPUs each: use a multiple of 8"),
        (("cluster.workers=24",), "train.global_batch_size=256 cannot be divided among 24 workers"),
        (("cluster.workers=32", "--set", "nodes=2"), "cluster.workers=32 needs 32 GPUs, and overlay multi-node with 2"),
        (("data.root=imagenet",), "data.root=imagenet is on no volume that all pods share: /data is"),
        (("run.output=/data/runs",), "run.output=/data/runs is on no volume that all pods share: /runs is"),
        (("run.name=Dense_Net",), "run.name=Dense_Net must be set"),
        (("--set", "node=4"), "--set node=4 is not known: use KEY=VALUE with a KEY of nodes, gpus-per-node"),
        (("--set", "nodes=none"), "--set nodes=none: nodes is a whole number of at least 1"),
        (
            ("cluster.workers={min: 8, max: 16, step: 8}", "--set", "nodes=2"),
            "--set nodes is for a fixed number of workers",
        ),
        (("optim.rl=1",), "did you mean 'optim.lr'?"),
    ],
)
def test_bad_input_is_told_when_rendering(densenet, arguments, message):
    usual = {"--overlay": "multi-node", "--image": IMAGE}
    given = [word for pair in usual.items() if pair[0] not in arguments for word in pair]
    code, printed = densenet("k8s", "render", config_of("multi-node"), *arguments, *given)
    assert code == 2, printed
    assert message in " ".join(printed.split())


def test_files_that_are_no_manifests_are_told(densenet, tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_text("a: 1")
    for file, message in (
        ("a.yaml", "a.yaml cannot be read as YAML"),
        ("b.yaml", "a document is no Kubernetes object"),
    ):
        code, printed = densenet("k8s", "validate", tmp_path / file)
        assert code == 2
        assert message in printed
