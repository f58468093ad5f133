"""Rehearsal of KubeRay and Kueue: the manifests' commands, run as local processes in a clean environment."""

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from mlflow.tracking import MlflowClient

from launch.cluster.ports import free_port
from launch.kubernetes.kubectl import K8S, kustomize
from launch.kubernetes.manifests import render
from tests.conftest import BIN
from tests.launch.cluster.test_cluster import live_nodes
from tests.launch.conftest import WAIT_TIMEOUT_S, Cluster, wait_until
from tests.servers import postgres

pytestmark = [pytest.mark.slow, pytest.mark.long]
CLEAN = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": "/tmp"}  # as in the image


class Job:
    """A RayJob of the overlay `local-cpu`: Ray nodes instead of pods, and an entrypoint submitted as KubeRay does."""

    def __init__(self, folder: Path, shell: Callable[..., Any]) -> None:
        self._shell, self.runs, self._tries = shell, folder / "runs", 0
        documents = list(
            yaml.safe_load_all(render(Path("demo"), ["run.name=demo"], "local-cpu", "run", "registry.test/d:1", []))
        )
        (spec,) = [document["spec"] for document in documents if document["kind"] == "RayJob"]
        (config,) = [document["data"]["train.yaml"] for document in documents if document["kind"] == "ConfigMap"]
        file = folder / "train.yaml"
        longer = {"train": yaml.safe_load(config)["train"] | {"epochs": 90, "log_every_steps": 5}}
        file.write_text(yaml.safe_dump(yaml.safe_load(config.replace("/runs", str(self.runs))) | longer))
        self.entrypoint = shlex.split(spec["entrypoint"].replace("/etc/densenet/train.yaml", str(file)))
        cluster = spec["rayClusterSpec"]
        self._head_cpus = int(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"])
        (group,) = cluster["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        self._worker_cpus = int(container["resources"]["limits"]["cpu"])
        self._hook = container["lifecycle"]["preStop"]["exec"]["command"]

    def start(self) -> None:
        """Starts the job's cluster and submits the entrypoint: first start, retry, or resume after a suspension."""
        self._tries += 1
        self.cluster = Cluster(cpus=self._head_cpus)
        self.cluster.add_node(cpus=self._worker_cpus)
        self.id = f"training-{self._tries}"
        options = ["--address", self.cluster.dashboard, "--no-wait", "--submission-id", self.id]
        done = self._shell("ray", "job", "submit", *options, "--", *self.entrypoint, env=self.cluster.env)
        assert done.returncode == 0, done.stdout

    def delete_worker(self) -> str:
        """Deletes the worker as the kubelet does (hook, SIGTERM, SIGKILL), and starts another as KubeRay does."""
        (node,) = [node for node, _, is_head in live_nodes(self.cluster, self._shell) if not is_head]
        hook = [word.replace("/runs", str(self.runs)) for word in self._hook[1:]]
        env = self.cluster.env | {"RAY_ADDRESS": self.cluster.address}
        drained = self._shell("python", *hook, "--node-id", node, env=env)
        number = len(self.cluster.nodes) - 1
        self.cluster.nodes[number].terminate()
        try:
            self.cluster.nodes[number].wait(30)
        except subprocess.TimeoutExpired:
            self.cluster.kill_node(number)
        self.cluster.add_node(cpus=self._worker_cpus)
        return drained.stdout

    def output(self) -> str:
        return self._shell(
            "ray", "job", "logs", "--address", self.cluster.dashboard, self.id, env=self.cluster.env
        ).stdout

    def wait_for(self, text: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        def is_printed() -> bool:
            printed = self.output()
            assert "training failed" not in printed, printed
            return text in printed

        wait_until(is_printed, self.output, timeout_s)

    def checkpoints(self) -> list[Path]:
        return sorted(self.runs.glob("demo/checkpoints/samples-*/manifest.json"))


@pytest.mark.timeout(2400)
def test_a_job_resumes_after_a_deleted_worker_a_lost_head_and_a_suspension(shell, tmp_path):
    job = Job(tmp_path, shell)
    job.start()
    try:
        wait_until(job.checkpoints, job.output, WAIT_TIMEOUT_S)
        printed = job.delete_worker()
        assert re.search(r"^wrote checkpoint .*/samples-\d+$", printed, re.MULTILINE), printed
        job.wait_for("resumed at")

        job.cluster.kill_node(0)  # the head: KubeRay ends the cluster and retries with a new one
        job.cluster.close()
        job.start()
        job.wait_for("resumed at")

        job.cluster.close()  # Kueue suspends the job: all of its pods go
        job.start()
        job.wait_for("resumed at")
        job.wait_for("models:/densenet_tiny@candidate", timeout_s=900)
    finally:
        job.cluster.close()
    client = MlflowClient(f"sqlite:///{job.runs}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "densenet"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    restarts = [run.data.tags[key] for key in sorted(run.data.tags) if key.startswith("restart.")]
    assert len(restarts) >= 3, restarts
    assert sum("the driver was restarted" in text for text in restarts) == 2, restarts


def test_the_tracking_servers_commands_run_on_an_empty_database(tmp_path):
    """The commands of `k8s/mlflow` on another port: database migration, server and allowed hosts."""
    (deployment,) = [d for d in kustomize(K8S / "mlflow") if d["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    (migrate,), (server,) = pod["initContainers"], pod["containers"]
    port = free_port()
    with postgres(tmp_path) as backend:
        env = CLEAN | {"BACKEND_STORE_URI": backend, "ARTIFACTS_DESTINATION": str(tmp_path / "artifacts")}
        done = subprocess.run(migrate["command"], env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        command = [
            part.replace("--host 0.0.0.0 --port 5000", f"--host 127.0.0.1 --port {port}") for part in server["command"]
        ]
        with (tmp_path / "server.log").open("w") as log:
            started = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
        url = f"http://127.0.0.1:{port}"

        def is_healthy() -> bool:
            assert started.poll() is None, (tmp_path / "server.log").read_text()
            try:
                return requests.get(f"{url}/health", headers={"Host": "10.1.2.3:5000"}, timeout=5).ok
            except requests.RequestException:  # also a timeout on a busy machine
                return False

        try:
            wait_until(is_healthy, lambda: (tmp_path / "server.log").read_text(), WAIT_TIMEOUT_S)
            for host, status in (("mlflow:5000", 200), ("mlflow.densenet.svc:5000", 200), ("evil.example", 403)):
                response = requests.get(
                    f"{url}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host}, timeout=30
                )
                assert response.status_code == status, (host, response.text)
        finally:
            subprocess.run(["kill", "-9", "--", f"-{started.pid}"], check=True)
            started.wait()
