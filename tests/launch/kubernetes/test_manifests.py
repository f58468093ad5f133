"""Kubernetes manifests: every overlay is valid, meets the restricted pod security standard, and fits its config."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from packaging.specifiers import SpecifierSet

from launch.cli import app
from launch.kubernetes.kubectl import kustomize
from launch.kubernetes.manifests import K8S, overlays
from launch.kubernetes.schemas import schema_errors
from pipeline.config_file import load_config
from tests.conftest import PROJECT
from tests.data import synthetic
from tests.launch.kubernetes.kube_api import kube_api, path_of

IMAGE = "registry.test/densenet:1.2.3"
CRDS = (PROJECT / ".." / "shared" / "k8s").resolve()
GPU = "nvidia.com/gpu"


def config_of(overlay: str) -> Path:
    """Returns the path of an overlay's own config."""
    own = K8S / "overlays" / overlay / "train.yaml"
    return own if own.is_file() else K8S / "base" / "train.yaml"


@pytest.fixture
def rendered(densenet) -> Callable[..., list[dict[str, Any]]]:
    """`rendered(overlay, *arguments)` renders an overlay with its own config; returns the objects."""

    def run(overlay: str, *arguments: object) -> list[dict[str, Any]]:
        if overlay != "local-cpu" and not any("storage-class=" in str(word) for word in arguments):
            arguments = (*arguments, "--set", "storage-class=default")
        command = ("k8s", "render", config_of(overlay), *arguments, "--overlay", overlay, "--image", IMAGE)
        code, printed = densenet(*command)
        assert code == 0, printed
        assert densenet(*command) == (0, printed), "the second output differs"
        return list(yaml.safe_load_all(printed))

    return run


def job_of(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (job,) = [document for document in documents if document["kind"] == "RayJob"]
    return job


def pods(job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Returns the pod specs of a job, by role."""
    cluster = job["spec"]["rayClusterSpec"]
    yield "submitter", job["spec"]["submitterPodTemplate"]["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize("overlay", overlays())
def test_every_object_is_valid_in_the_overlay_and_rendered(rendered, overlay):
    crds = CRDS if CRDS.is_dir() else None
    for documents in (kustomize(K8S / "overlays" / overlay), rendered(overlay)):
        problems = schema_errors(documents, crds)
        if crds is None:
            problems = [problem for problem in problems if "there is no schema for" not in problem]
        assert problems == []


@pytest.mark.parametrize("folder", ["mlflow", "data"])
def test_mlflow_and_data_preparation_are_valid_and_restricted(folder):
    documents = kustomize(K8S / folder)
    assert schema_errors(documents, None) == []
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


def test_image_lock_file_and_manifests_have_the_same_versions():
    text = (K8S / "images" / "Dockerfile").read_text()
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert f'image.version="{project["version"]}"' in text
    (python,) = re.findall(r"^ARG PYTHON=(3\.\d+\.\d+)-slim-bookworm$", text, re.MULTILINE)
    assert SpecifierSet(project["requires-python"]).contains(python)
    assert f"--python-version {python.rpartition('.')[0]} " in (PROJECT / "Makefile").read_text()
    (cuda,) = re.findall(r'NVIDIA_REQUIRE_CUDA="cuda>=([\d.]+)"', text)
    lock = (PROJECT / "requirements.lock").read_text()
    assert cuda == torch.version.cuda
    assert re.search(rf"^cuda-toolkit=={re.escape(cuda)}\.", lock, re.MULTILINE)
    assert re.search(rf"^nvidia-dali-cuda{cuda.replace('.', '')}==", lock, re.MULTILINE)
    (ray,) = re.findall(r"^ray==(\S+)", lock, re.MULTILINE)
    for overlay in overlays():
        job = job_of(kustomize(K8S / "overlays" / overlay))
        assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray == version("ray")
        for _, pod in pods(job):
            assert [c["image"].rpartition(":")[2] for c in pod["containers"]] == [project["version"]]


def test_each_pod_of_the_preparation_writes_its_part(densenet, tmp_path):
    (job,) = kustomize(K8S / "data")
    shares = job["spec"]["completions"]
    assert (job["spec"]["completionMode"], job["spec"]["parallelism"]) == ("Indexed", shares)
    program, *words = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert program == "densenet"
    synthetic.write_ilsvrc(tmp_path / "downloads", synthetic.images())
    paths = {"/downloads": str(tmp_path / "downloads"), "/data/imagenet": str(tmp_path / "data")}
    for index in range(shares):
        command = [paths.get(w, w).replace("$(JOB_COMPLETION_INDEX)", str(index)) for w in words]
        code, printed = densenet(*command, "--workers", 1, "--shard-size", 0.01)
        assert code == 0, printed
        assert ("the last share completes the data set" in printed) == (index < shares - 1)
    code, printed = densenet("data", "verify", tmp_path / "data", "--workers", 1)
    assert code == 0, printed


def test_unknown_fields_and_wrong_types_are_found_in_custom_kinds_too(rendered):
    if not CRDS.is_dir():
        pytest.skip("KubeRay's CustomResourceDefinitions are not on this machine (../shared/k8s)")
    documents = rendered("local-cpu")
    job = job_of(documents)
    job["spec"]["backofLimit"] = 3
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "many"
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Never"
    problems = " ".join(schema_errors(documents, CRDS))
    for word in ("backofLimit", "'many' is not of type 'integer'", "imagePulPolicy"):
        assert word in problems
    (claim, *_) = [document for document in documents if document["kind"] == "PersistentVolumeClaim"]
    claim["spec"]["acessModes"] = []
    assert "acessModes" in " ".join(schema_errors([claim], None))
    assert "there is no schema for ray.io/v1 RayJob: set --crds DIR" in " ".join(schema_errors([job], None))


@pytest.mark.parametrize("overlay", overlays())
def test_pods_meet_the_restricted_standard_and_set_resources(rendered, overlay):
    documents = rendered(overlay)
    for role, pod in pods(job_of(documents)):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0, role
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
            if role != "submitter":
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    for _, pod in list(pods(job_of(documents)))[2:]:
        (hook,) = [c["lifecycle"]["preStop"]["exec"]["command"] for c in pod["containers"]]
        assert pod["terminationGracePeriodSeconds"] > int(hook[hook.index("--wait") + 1])
    (namespace,) = [document for document in documents if document["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("overlay", overlays())
def test_the_entrypoint_is_a_command_and_its_config_loads(rendered, overlay, tmp_path):
    documents = rendered(overlay)
    job = job_of(documents)
    program, command, file = job["spec"]["entrypoint"].split()
    assert (program, command) == ("densenet", "train")
    assert command in typer.main.get_command(app).commands
    (config,) = [document for document in documents if document["kind"] == "ConfigMap"]
    text = config["data"][Path(file).name]
    (tmp_path / "train.yaml").write_text(text)
    assert load_config(tmp_path / "train.yaml") == load_config(config_of(overlay))
    assert job["metadata"]["name"] == load_config(config_of(overlay)).run.name


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


def test_local_disks_buckets_and_an_existing_mlflow_server(rendered):
    overrides = ("data.root=s3://bucket/imagenet", "data.stage=/stage/imagenet", "checkpoint.storage=s3://bucket/runs")
    settings = [f"--set={word}" for word in ("stage-class=nvme", "secret=keys")]
    server = "tracking.uri=https://mlflow.example:8443/tracking"
    documents = rendered("multi-node", *overrides, server, *settings, "--set", "storage-class=nfs")
    assert schema_errors(documents, CRDS if CRDS.is_dir() else None) == [] or not CRDS.is_dir()
    job = job_of(documents)
    _, (_, head), (_, workers) = pods(job)
    (volume,) = [volume for volume in workers["volumes"] if volume["name"] == "stage"]
    claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["accessModes"]) == ("nvme", ["ReadWriteOnce"])
    assert {"name": "stage", "mountPath": "/stage"} in workers["containers"][0]["volumeMounts"]
    assert "stage" not in [volume["name"] for volume in head["volumes"]]
    assert [pod["containers"][0]["envFrom"] for pod in (head, workers)] == 2 * [[{"secretRef": {"name": "keys"}}]]
    (policy,) = [document for document in documents if document["kind"] == "NetworkPolicy"]
    assert {"ports": [{"port": 8443}]} in policy["spec"]["egress"]
    registry = "tracking.registry_uri=http://registry.example:5555"
    documents = rendered("multi-node", *overrides, server, registry, *settings, "--set", "storage-class=nfs")
    (policy,) = [document for document in documents if document["kind"] == "NetworkPolicy"]
    assert {"ports": [{"port": 5555}, {"port": 8443}]} in policy["spec"]["egress"]
    documents = rendered("multi-node", *overrides, "--set=stage-class=nvme", "--set=secret=none")
    assert [pod["containers"][0]["envFrom"] for _, pod in list(pods(job_of(documents)))[1:]] == [[], []]
    (policy,) = [document for document in documents if document["kind"] == "NetworkPolicy"]
    assert policy["spec"]["egress"][-1] == {"ports": [{"port": 443}]}, "MLflow is in the namespace"


def test_diff_shows_the_changes_of_apply(densenet, rendered, tmp_path, monkeypatch):
    """Runs `kubectl diff` against a fake API server."""
    documents = rendered("local-cpu")
    command = ("k8s", "diff", config_of("local-cpu"), "--overlay", "local-cpu", "--image")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with kube_api(documents) as (address, objects):
        parts = {"clusters": ("cluster", {"server": address}), "users": ("user", {})}
        parts["contexts"] = ("context", {"cluster": "local", "user": "local"})
        config = {key: [{"name": "local", name: value}] for key, (name, value) in parts.items()}
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump({"kind": "Config", "current-context": "local"} | config))
        diff = [sys.executable, "-c", "import sys; from launch.cli import main; sys.exit(main())", *map(str, command)]

        def differences(image: str) -> tuple[int, str]:
            done = subprocess.run([*diff, image], capture_output=True, text=True, cwd=PROJECT)
            return done.returncode, done.stdout

        code, printed = differences(IMAGE)
        assert code == 1
        assert all(f"+  name: {document['metadata']['name']}" in printed for document in documents)
        for document in documents:
            objects[path_of(document)] = document | {"metadata": {"annotations": {}} | document["metadata"]}
        assert differences(IMAGE) == (0, "")
        code, printed = differences("registry.test/densenet:1.2.4")
        changed = [line.strip() for line in printed.splitlines() if re.match(r"^[+-] ", line)]
        assert code == 1
        assert {line[0] + line.rpartition("- ")[2].lstrip("+ ") for line in changed} == {
            "-image: registry.test/densenet:1.2.3",
            "+image: registry.test/densenet:1.2.4",
        }
    code, printed = densenet(*command, IMAGE)
    assert code == 2
    assert "kubectl diff failed" in printed and "kubectl config current-context" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--overlay", "cloud"),
            "--overlay=cloud is not known: use kueue, local-cpu, multi-node",
        ),
        (("--image", "densenet"), "--image=densenet needs a fixed tag"),
        (("--image", "densenet:latest"), "--image=densenet:latest needs a fixed tag"),
        (("cluster.workers=12",), "cluster.workers=12 does not fill nodes with 8 GPUs each: use a multiple of 8"),
        (("cluster.workers=24",), "train.global_batch_size=256 cannot be divided among 24 workers"),
        (("cluster.workers=32", "--set", "nodes=2"), "cluster.workers=32 needs 32 GPUs, and overlay multi-node with 2"),
        (("data.root=imagenet",), "data.root=imagenet must be below /data, a volume that all pods share"),
        (("run.output=/data/runs",), "run.output=/data/runs must be below /runs, a volume that all pods share"),
        (("run.name=Dense_Net",), "run.name=Dense_Net must be set"),
        (("--set=storage-class=",), "--set storage-class= is not a Kubernetes object name"),
        (("--set=secret=My_Keys",), "--set secret=My_Keys is not a Kubernetes object name: use lowercase letters"),
        (("--set=memory=lots",), "--set memory=lots is not an amount of memory: use for example 200Gi"),
        (
            ("data.root=s3://bucket/set", "data.stage=/stage"),
            "data.root=s3://bucket/set needs credentials: use --set secret",
        ),
        (("data.stage=/tmp/stage",), "data.stage=/tmp/stage must be below /stage, the node's local disk."),
        (("data.stage=/stage",), "data.stage=/stage needs a local disk on each node: use --set stage-class=NAME"),
        (("--set=stage-class=nvme",), "--set stage-class needs data.stage=/stage, which is not set"),
        (("--set", "node=4"), "--set node=4 is not known: use KEY=VALUE with a KEY of nodes, gpus-per-node"),
        (("--set", "nodes=none"), "--set nodes=none: nodes must be an integer of at least 1"),
        (
            ("cluster.workers={min: 8, max: 16, step: 8}", "--set", "nodes=2"),
            "--set nodes is for a fixed number of workers",
        ),
        (("optim.rl=1",), "did you mean 'optim.lr'?"),
    ],
)
def test_render_refuses_bad_input(densenet, arguments, message):
    defaults = {"--overlay": "multi-node", "--image": IMAGE}
    options = [word for pair in defaults.items() if pair[0] not in arguments for word in pair]
    if "storage-class" not in message:
        options.append("--set=storage-class=default")
    code, printed = densenet("k8s", "render", config_of("multi-node"), *arguments, *options)
    assert code == 2, printed
    assert message in " ".join(printed.split())


def test_shared_volumes_need_a_storage_class(densenet):
    code, printed = densenet(
        "k8s", "render", config_of("multi-node"), "--overlay=multi-node", "--image", IMAGE, "--set=nodes=4"
    )
    assert code == 2
    assert (
        "the volumes data and runs of overlay multi-node are read and written on several nodes: use --set " in printed
    )


def test_validate_refuses_files_that_are_not_manifests(densenet, tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_text("a: 1")
    for file, message in (
        ("a.yaml", "a.yaml cannot be read as YAML"),
        ("b.yaml", "a document is not a Kubernetes object"),
    ):
        code, printed = densenet("k8s", "validate", tmp_path / file)
        assert code == 2
        assert message in printed
