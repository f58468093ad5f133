"""Elastic training over two Ray nodes: one is lost and returns, the run shrinks and grows, and MLflow records it."""

import re
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.launch.conftest import WAIT_TIMEOUT_S, Cluster, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_run_over_two_nodes_resumes_when_one_is_lost_and_returns(cluster: Cluster, shell, tmp_path: Path):
    """Three workers, then the two that fit on the head, then three again."""
    cluster.add_node(cpus=1)
    where = ["--address", cluster.dashboard]
    elastic = ["cluster.workers={min: 1, max: 3}", "cluster.cpus_per_worker=1", "cluster.resize_interval_s=15"]
    run = ["run.name=elastic", "train.global_batch_size=48", "train.epochs=2000", f"run.output={tmp_path}", *elastic]
    started = shell("densenet", "submit", "configs/demo.yaml", *run, "--no-env", "--detach", *where, env=cluster.env)
    assert started.returncode == 0, started.stdout
    job = re.search(r"job (elastic-\d+) trains", started.stdout)[1]

    def output() -> str:
        return shell("densenet", "jobs", "logs", job, *where, env=cluster.env).stdout

    def until(text: str, times: int = 1) -> None:
        def printed_often_enough() -> bool:
            printed = output()
            assert "training failed" not in printed, printed
            return printed.count(text) >= times

        wait_until(printed_often_enough, output, WAIT_TIMEOUT_S)

    checkpoints = tmp_path / "elastic" / "checkpoints"
    wait_until(lambda: list(checkpoints.glob("samples-*/manifest.json")), output, WAIT_TIMEOUT_S)
    assert "workers      3 on cpu" in output()

    cluster.kill_node(1)
    until("resumed at")
    assert "the run now has 2 workers, previously 3" in output()
    assert re.search(r"warning: worker \d was lost: its (process or node died|connection to another)", output())

    cluster.add_node(cpus=1)
    until("resumed at", times=2)
    assert "warning: the cluster has changed: all workers were restarted (start 3)" in output()
    assert "the run now has 3 workers, previously 2" in output()

    def exported(name: str) -> list[str]:
        """Returns the values of a metric of the run on all nodes."""
        series = rf'^{name}{{[^}}]*run="elastic"[^}}]*}} (.*)$'
        return re.findall(series, exported_metrics(cluster, shell), re.MULTILINE)

    wait_until(lambda: exported("ray_densenet_images_per_second"), output, WAIT_TIMEOUT_S)
    wait_until(lambda: exported("ray_densenet_restarts_total") == ["2.0"], output, WAIT_TIMEOUT_S)
    assert exported("ray_densenet_worker_failures_total") == ["1.0"]
    assert exported("ray_densenet_workers") == ["3.0"]

    (added,) = [node for node, _, is_head in live_nodes(cluster, shell) if not is_head]
    hook = ["-m", "launch.kubernetes.pre_stop", "--run", str(tmp_path / "elastic"), "--node-id", added]
    drained = shell("python", *hook, env=cluster.env | {"RAY_ADDRESS": cluster.address})
    assert re.search(r"^wrote checkpoint .*/samples-\d+$", drained.stdout, re.MULTILINE), drained.stdout
    until("warning: a node of this run will be preempted; a checkpoint is written now")

    shell("densenet", "jobs", "stop", job, *where, env=cluster.env)
    assert "stopped by SIGTERM at" in output()
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        restarts = dict(store.execute("select key, value from tags where key like 'restart.%'").fetchall())
        query = "select value from metrics where key = 'lost_samples' order by timestamp"
        lost, lost_in_all = (int(value) for (value,) in store.execute(query).fetchall())
    resumed = r"; resumed at \d+ samples, {} samples are trained again"
    assert re.search(r"worker \d: its .*" + resumed.format(lost), restarts["restart.1"])
    assert re.search("the cluster has changed" + resumed.format(lost_in_all - lost), restarts["restart.2"])


NODES = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
for node in ray.nodes():
    if node["Alive"]:
        is_head = "node:__internal_head__" in node["Resources"]
        print("node", node["NodeID"], f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}", int(is_head))
"""
Shell = Callable[..., subprocess.CompletedProcess[str]]


def live_nodes(cluster: Cluster, shell: Shell) -> list[tuple[str, str, bool]]:
    """Returns the id, the URL of the metrics, and whether it is the head, of each live node."""
    lines = shell("python", "-c", NODES, cluster.address, env=cluster.env).stdout.splitlines()
    rows = [line.split()[1:] for line in lines if line.startswith("node ")]
    return [(node, metrics, head == "1") for node, metrics, head in rows]


def exported_metrics(cluster: Cluster, shell: Shell) -> str:
    """Returns the metrics that Prometheus would read from all nodes."""
    return "".join(requests.get(f"{url}/metrics", timeout=10).text for _, url, _ in live_nodes(cluster, shell))
