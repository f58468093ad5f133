"""Kubernetes manifests: every overlay is valid, meets the restricted pod security standard, and fits its config."""

import re
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
from launch.kubernetes.kubectl import K8S, kustomize
from launch.kubernetes.manifests import PARTS, overlays, to_yaml
from launch.kubernetes.quantities import parse_quantity
from launch.kubernetes.schemas import schema_errors
from pipeline.config_file import load_config
from tests.conftest import PROJECT
from tests.data import synthetic

IMAGE = "registry.test/densenet:1.2.3"
CRDS = (PROJECT / ".." / "shared" / "k8s").resolve()
GPU = "nvidia.com/gpu"


@pytest.fixture
def render(densenet) -> Callable[..., list[dict[str, Any]]]:
    """`render(overlay, *arguments)` renders a part of an overlay, by default a run `first`; returns the objects."""

    def run(overlay: str, *arguments: object, name: str = "first") -> list[dict[str, Any]]:
        command = ("k8s", "render", *command_of(overlay, *arguments, name=name))
        code, printed = densenet(*command)
        assert code == 0, printed
        assert densenet(*command) == (0, printed), "the second output differs"
        return list(yaml.safe_load_all(printed))

    return run


def command_of(overlay: str, *arguments: object, name: str = "first") -> list[object]:
    """Returns the arguments of `densenet k8s render` and `diff`."""
    config = "demo" if overlay == "local-cpu" else "densenet121"
    batch = ["train.global_batch_size=1920"] if overlay == "spot" else []
    return [config, f"run.name={name}", *batch, *arguments, "--overlay", overlay, "--image", IMAGE]


def job_of(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (job,) = [document for document in documents if document["kind"] == "RayJob"]
    return job


def shared_memory(pod: dict[str, Any]) -> str:
    (size,) = [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "shm"]
    return size


def pods(job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Returns the pod specs of a job, by role."""
    cluster = job["spec"]["rayClusterSpec"]
    yield "submitter", job["spec"]["submitterPodTemplate"]["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize("overlay", overlays())
def test_every_object_is_valid_in_the_overlay_and_rendered(render, overlay):
    crds = CRDS if CRDS.is_dir() else None
    parts = [render(overlay, f"--part={part}", "--set=storage-class=default") for part in PARTS]
    for documents in (kustomize(K8S / "overlays" / overlay), *parts):
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
    (job,) = [document for document in kustomize(K8S / "data") if document["kind"] == "Job"]
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


def test_unknown_fields_and_wrong_types_are_found_in_custom_kinds_too(render):
    if not CRDS.is_dir():
        pytest.skip("KubeRay's CustomResourceDefinitions are not on this machine (../shared/k8s)")
    documents = render("local-cpu")
    job = job_of(documents)
    job["spec"]["backofLimit"] = 3
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "many"
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Never"
    problems = " ".join(schema_errors(documents, CRDS))
    for word in ("backofLimit", "'many' is not of type 'integer'", "imagePulPolicy"):
        assert word in problems
    (claim, _) = [d for d in kustomize(K8S / "namespace") if d["kind"] == "PersistentVolumeClaim"]
    claim["spec"]["acessModes"] = []
    assert "acessModes" in " ".join(schema_errors([claim], None))
    assert "there is no schema for ray.io/v1 RayJob: set --crds DIR" in " ".join(schema_errors([job], None))


@pytest.mark.parametrize("overlay", overlays())
def test_pods_meet_the_restricted_standard_and_set_resources(render, overlay):
    documents = render(overlay)
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
    (namespace,) = [document for document in kustomize(K8S / "cluster") if document["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("overlay", overlays())
def test_the_entrypoint_is_a_command_and_its_config_loads(render, overlay, tmp_path):
    documents = render(overlay)
    job = job_of(documents)
    program, command, file = job["spec"]["entrypoint"].split()
    assert (program, command) == ("densenet", "train")
    assert command in typer.main.get_command(app).commands
    (config,) = [document for document in documents if document["kind"] == "ConfigMap"]
    (tmp_path / "train.yaml").write_text(config["data"][Path(file).name])
    loaded = load_config(tmp_path / "train.yaml")
    assert job["metadata"]["name"] == loaded.run.name == "first"
    assert loaded.run.output == "/runs"
    assert loaded.model.name == ("densenet_tiny" if overlay == "local-cpu" else "densenet121")


def test_workers_follow_the_config(render):
    group = job_of(render("multi-node", "cluster.workers=64"))["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (8, 8, 8)
    words = ("gpus-per-node=4", "cpus-per-node=32", "memory=100Gi", "nodes=2", "secret=keys")
    documents = render("multi-node", *(f"--set={word}" for word in words))
    group = job_of(documents)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["replicas"] == 2
    (container,) = group["template"]["spec"]["containers"]
    amounts = {"cpu": "32", "memory": "100Gi", GPU: "4"}
    assert container["resources"] == {"limits": amounts, "requests": amounts | {"ephemeral-storage": "20Gi"}}
    assert shared_memory(group["template"]["spec"]) == "50Gi", "it counts as the pod's memory"
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    group = job_of(render("spot"))["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 4)


def test_an_overlays_values_hold_unless_the_config_sets_them(densenet, render):
    def loaded(overlay: str, *arguments: str) -> Any:
        (text,) = [d["data"]["train.yaml"] for d in render(overlay, *arguments) if d["kind"] == "ConfigMap"]
        return load_config(yaml.safe_load(text))

    local = loaded("local-cpu")
    assert (local.tracking.uri, local.cluster.cpus_per_worker) == ("sqlite:////runs/mlflow.db", 1)
    assert local.cluster.workers == 2, "demo sets it"
    assert loaded("local-cpu", "tracking.uri=http://mlflow:5000").tracking.uri == "http://mlflow:5000"
    spot = loaded("spot")
    assert (spot.checkpoint.every_minutes, spot.cluster.max_failures, spot.data.root) == (5, 1000, "/data/imagenet")
    spot = loaded("spot", "cluster.max_failures=2", "cluster.workers={min: 8, max: 16, step: 8}")
    assert (spot.cluster.max_failures, spot.cluster.workers.max, spot.checkpoint.every_minutes) == (2, 16, 5)
    (_, local), (_, spot) = (list(pods(job_of(render(overlay))))[2] for overlay in ("local-cpu", "spot"))
    assert local["containers"][0]["resources"]["requests"]["memory"] == "4Gi"
    assert local["containers"][0]["resources"]["limits"]["memory"] == "6Gi"
    code, printed = densenet("k8s", "render", *command_of("spot", "cluster.max_failures=2", "--set=grace-period=30"))
    header = [line for line in printed.splitlines() if line.startswith("#")]
    assert code == 0
    assert header[1:] == [
        "# Config: densenet121, where it sets a key.",
        '# Overlay spot: data.root="/data/imagenet" run.output="/runs" checkpoint.every_minutes=5 '
        'cluster.workers={"min": 8, "max": 32, "step": 8}.',
        "# Command: run.name=first train.global_batch_size=1920 cluster.max_failures=2 --set=grace-period=30.",
        "# Worker pods: 1 to 4, each with cpu 64, memory 400Gi, nvidia.com/gpu 8.",
    ]


def test_the_part_of_a_run_takes_neither_the_namespace_nor_the_volumes_with_it(densenet, render):
    kinds = {
        part: sorted({document["kind"] for document in render("kueue", f"--part={part}", "--set=storage-class=nfs")})
        for part in PARTS
    }
    assert kinds == {
        "cluster": ["ClusterQueue", "Namespace", "PriorityClass", "ResourceFlavor"],
        "namespace": ["LocalQueue", "PersistentVolumeClaim", "ServiceAccount"],
        "run": ["ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "RayJob"],
    }
    for part in ("cluster", "namespace"):  # no run yet: neither its name nor its batch size matters
        words = ("densenet121", "--overlay=spot", f"--part={part}", "--set=storage-class=nfs")
        code, printed = densenet("k8s", "render", *words)
        assert code == 0, printed
    documents = render("multi-node", "--part=namespace", "--set=storage-class=nfs", "--set=namespace=team")
    claims = [document for document in documents if document["kind"] == "PersistentVolumeClaim"]
    assert {claim["spec"]["storageClassName"] for claim in claims} == {"nfs"}
    assert {document["metadata"]["namespace"] for document in documents} == {"team"}
    for document in render("kueue", "--part=cluster", "--set=namespace=team"):
        assert "namespace" not in document["metadata"]
        assert document["kind"] != "Namespace" or document["metadata"]["name"] == "team"


def test_the_grace_period_and_egress_can_be_set(render):
    documents = render("multi-node", "--set=grace-period=30", "--set=egress=169.254.20.10:53,10.0.0.0/8:9000")
    _, _, (_, workers) = pods(job_of(documents))
    hook = workers["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (workers["terminationGracePeriodSeconds"], hook[hook.index("--wait") + 1]) == (30, "20")
    assert hook[hook.index("--run") + 1] == "/runs/first", "another run's checkpoint must not end the wait"
    (policy,) = [document for document in documents if document["kind"] == "NetworkPolicy"]
    dns, storage = policy["spec"]["egress"][-2:]
    assert dns["to"] == [{"ipBlock": {"cidr": "169.254.20.10/32"}}]
    assert [(port["port"], port["protocol"]) for port in dns["ports"]] == [(53, "UDP"), (53, "TCP")]
    assert storage == {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 9000, "protocol": "TCP"}]}


@pytest.mark.parametrize("overlay", overlays())
def test_ray_and_its_object_store_fit_into_the_pods(render, overlay):
    job = job_of(render(overlay))
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        store = int(group["rayStartParams"]["object-store-memory"])
        memory = parse_quantity(resources["limits"]["memory"])
        assert store <= parse_quantity(shared_memory(pod)) <= memory / 2
        assert "ephemeral-storage" in resources["requests"], "/tmp has gigabytes of logs and sockets"


def test_text_is_written_so_that_kubernetes_reads_the_same(tmp_path):
    """kubectl's YAML parser takes `1e5` and `0o7` for numbers, PyYAML does not."""
    texts = ["1e5", "0o7", "0x1f", "1_0", "1.2.3", ".5e3", "12:30:00", "2026-01-01", "on", "y", "null", "~", "", "-"]
    texts += ["a: b", "# c", " a", "a\nb", "a \n\n", "\ta\nb", "\u00e9\u2028", "${x}", "'\"", "!x", "&a", "*a"]
    texts += ["%a", "@a", "`a", "\U0001f600"]
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}}
    config["data"] = {f"key{number}": text for number, text in enumerate(texts)}
    (tmp_path / "map.yaml").write_text(to_yaml([config]), encoding="utf-8")
    (tmp_path / "kustomization.yaml").write_text("resources: [map.yaml]")
    (read,) = kustomize(tmp_path)
    assert read["data"] == config["data"]


def test_local_disks_buckets_and_an_existing_mlflow_server(render):
    overrides = ("data.root=s3://bucket/imagenet", "data.stage=/stage/imagenet", "checkpoint.storage=s3://bucket/runs")
    settings = [f"--set={word}" for word in ("stage-class=nvme", "secret=keys")]
    server = "tracking.uri=https://mlflow.example:8443/tracking"
    documents = render("multi-node", *overrides, server, *settings)
    assert schema_errors(documents, CRDS if CRDS.is_dir() else None) == [] or not CRDS.is_dir()
    job = job_of(documents)
    _, (_, head), (_, workers) = pods(job)
    (volume,) = [volume for volume in workers["volumes"] if volume["name"] == "stage"]
    claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["accessModes"]) == ("nvme", ["ReadWriteOnce"])
    assert claim["resources"]["requests"]["storage"] == "200Gi"
    assert {"name": "stage", "mountPath": "/stage"} in workers["containers"][0]["volumeMounts"]
    assert "stage" not in [volume["name"] for volume in head["volumes"]]
    assert [pod["containers"][0]["envFrom"] for pod in (head, workers)] == 2 * [[{"secretRef": {"name": "keys"}}]]
    (policy,) = [document for document in documents if document["kind"] == "NetworkPolicy"]
    assert {"ports": [{"port": 8443}]} in policy["spec"]["egress"]
    registry = "tracking.registry_uri=http://registry.example:5555"
    documents = render("multi-node", *overrides, server, registry, *settings)
    (policy,) = [document for document in documents if document["kind"] == "NetworkPolicy"]
    assert {"ports": [{"port": 5555}, {"port": 8443}]} in policy["spec"]["egress"]
    documents = render("multi-node", *overrides, "--set=stage-class=nvme", "--set=secret=none")
    assert [pod["containers"][0]["envFrom"] for _, pod in list(pods(job_of(documents)))[1:]] == [[], []]
    (policy,) = [document for document in documents if document["kind"] == "NetworkPolicy"]
    assert policy["spec"]["egress"][-1] == {"ports": [{"port": 443}]}, "MLflow is in the namespace"


def test_the_volume_for_staging_is_as_large_as_the_limit(render):
    overrides = ("data.stage=/stage", "data.stage_limit=1.5TB", "data.shuffle=windowed")
    _, _, (_, workers) = pods(job_of(render("multi-node", *overrides, "--set=stage-class=nvme")))
    (volume,) = [volume for volume in workers["volumes"] if volume["name"] == "stage"]
    size = volume["ephemeral"]["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"]
    assert size == "1537Gi", "1.1 times the limit, in whole GiB"


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
        (("run.name=null",), "run.name=None must be set, since retries resume the run of this name"),
        (("run.name=Dense_Net",), "run.name=Dense_Net must be set"),
        (
            ("run.name=1st",),
            "run.name=1st must be set, since retries resume the run of this name, and be the name of",
        ),
        (
            ("run.name=prepare-imagenet",),
            "run.name=prepare-imagenet is the name of another Job of k8s/: choose another",
        ),
        (("run.name=mlflow",), "run.name=mlflow is the name of another NetworkPolicy of k8s/: choose"),
        (("--part=all",), "--part=all is not known: use cluster, namespace, run."),
        (("data.root=/data/../etc",), "data.root=/data/../etc must be below /data, a volume that all pods share."),
        (("tracking.uri=sqlite:///mlflow.db",), "tracking.uri=sqlite:///mlflow.db must be below /runs, a volume"),
        (
            ("--set=namespace=a.b",),
            "--set namespace=a.b is not the name of a namespace: use up to 63 lowercase letters",
        ),
        (("--set=secret=a..b",), "--set secret=a..b is not a Kubernetes object name"),
        (("--set=nodes=1", "--set=nodes=2"), "--set nodes is set twice: use one value."),
        (("--set=egress=minio:9000",), "--set egress=minio:9000 is not ADDRESS:PORT: use an IP address or a block"),
        (("--set=egress=10.0.0.1:0",), "--set egress=10.0.0.1:0 is not ADDRESS:PORT"),
        (("--set=grace-period=2",), "--set grace-period=2: grace-period must be an integer of at least 3."),
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
    code, printed = densenet("k8s", "render", "densenet121", "run.name=first", *arguments, *options)
    assert code == 2, printed
    assert message in " ".join(printed.split())


def test_shared_volumes_need_a_storage_class(densenet):
    code, printed = densenet("k8s", "render", "densenet121", "--part=namespace", "--overlay=multi-node")
    assert code == 2
    assert "the volume data of overlay multi-node is read and written on several nodes: use --set " in printed


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
