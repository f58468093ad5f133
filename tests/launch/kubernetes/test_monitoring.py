"""Monitoring: metric names, dashboard and alerts agree with what a real run exports and a real Prometheus answers."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from launch.cluster.metrics import COUNTERS, GAUGES
from launch.cluster.ports import free_port
from launch.kubernetes.kubectl import kustomize
from launch.kubernetes.manifests import K8S
from launch.kubernetes.schemas import schema_errors
from tests.conftest import BIN, PROJECT
from tests.launch.conftest import WAIT_TIMEOUT_S, wait_until

CRDS = (PROJECT / ".." / "shared" / "k8s").resolve()
FOLDER = K8S / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())
EXPORTED = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
METRIC = re.compile(r"\bray_\w+")
ON_GPUS = ("loss_scale", "mfu_ratio", "gpu_memory_peak_bytes", "ray_node_gpus_", "ray_node_gram_")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def panel_queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def rule_queries() -> list[str]:
    return [rule["expr"] for group in RULES["spec"]["groups"] for rule in group["rules"]]


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"there is no {name} on this machine (Debian's package prometheus)")
    return path


def test_every_metric_is_exported_and_every_exported_metric_is_shown():
    used = {name for query in [*panel_queries(), *rule_queries()] for name in METRIC.findall(query)}
    of_nodes = {f"ray_{name}" for name in METRICS_GAUGES}
    assert used <= EXPORTED | of_nodes
    assert set(METRIC.findall(" ".join(panel_queries()))) >= EXPORTED


def test_the_guide_lists_every_metric():
    guide = (PROJECT / "docs" / "monitoring.md").read_text()
    assert set(re.findall(r"^\| `(ray_densenet_\w+)` \|", guide, re.MULTILINE)) == EXPORTED
    for group in RULES["spec"]["groups"]:
        for rule in group["rules"]:
            assert f"| `{rule['alert']}` |" in guide


def test_names_follow_the_conventions_of_prometheus():
    assert all(re.fullmatch("densenet_[a-z0-9_]+", name) for name in [*GAUGES, *COUNTERS])
    assert not [name for name in [*GAUGES, *COUNTERS] if name.endswith("_total")], "Ray adds it to counters"
    for name in GAUGES:
        assert not re.search("_(s|ms|gb|mb|percent)$", name), f"{name} has no base unit"


def test_each_panel_has_a_unit_a_description_and_the_chosen_data_source():
    (source,) = [variable for variable in DASHBOARD["templating"]["list"] if variable["type"] == "datasource"]
    (run,) = [variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run"]
    chosen = {"type": "prometheus", "uid": f"${{{source['name']}}}"}
    assert run["datasource"] == chosen
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"], panel["title"]
        assert panel["datasource"] == chosen
        for target in panel["targets"]:
            assert target["datasource"] == chosen
            assert 'run=~"$run"' in target["expr"], panel["title"]


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_manifests_select_the_training_pods():
    documents = kustomize(FOLDER)
    by_kind = {document["kind"]: document for document in documents}
    assert sorted(by_kind) == ["ConfigMap", "PodMonitor", "PrometheusRule"]
    assert {document["metadata"]["namespace"] for document in documents} == {"densenet"}
    monitor = by_kind["PodMonitor"]["spec"]
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["metrics"]
    (job,) = [o for o in kustomize(K8S / "overlays" / "multi-node") if o["kind"] == "RayJob"]
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert monitor["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]
    config = by_kind["ConfigMap"]
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["dashboard.json"]) == DASHBOARD
    problems = schema_errors(documents, CRDS if CRDS.is_dir() else None)
    assert [problem for problem in problems if "there is no schema for" not in problem] == []


def test_alerts_fire_on_hangs_failures_and_nan_and_not_on_ended_runs(tmp_path):
    promtool = program("promtool")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES["spec"]))
    shutil.copy(Path(__file__).with_name("alerts.yaml"), tmp_path)
    for command in (("check", "rules", "rules.yaml"), ("test", "rules", "alerts.yaml")):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    cases = (tmp_path / "alerts.yaml").read_text()
    for group in RULES["spec"]["groups"]:
        for rule in group["rules"]:
            assert f'alertname="{rule["alert"]}", alertstate="firing"' in cases


class TrainingRun:
    """A run of the demo with its own embedded Ray, which ends on SIGTERM."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "run.log"
        self._discovery = folder / "ray" / "prom_metrics_service_discovery.json"
        settings = [f"run.output={folder / 'out'}", "run.name=demo", "train.epochs=3000", "ema.decay=0.9"]
        settings.append("cluster.dashboard_port=auto")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [BIN / "densenet", "train", "configs/demo.yaml", *settings],
                cwd=PROJECT,
                env=os.environ | {"RAY_TMPDIR": str(folder)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        assert self.process.poll() is None, self._log.read_text()
        return self._log.read_text()

    def targets(self) -> list[str]:
        """Returns the addresses of Ray's metrics in its file for Prometheus."""
        self.output()
        if not self._discovery.is_file():
            return []
        return [target for group in json.loads(self._discovery.read_text()) for target in group["targets"]]

    def exported(self) -> dict[str, list[str]]:
        """Returns the exported lines of each metric."""
        lines: dict[str, list[str]] = {}
        for target in self.targets():
            with suppress(requests.ConnectionError):  # it is starting
                for line in requests.get(f"http://{target}/metrics", timeout=30).text.splitlines():
                    if not line.startswith("#"):
                        lines.setdefault(re.split("[{ ]", line)[0], []).append(line)
        return lines


@pytest.fixture(scope="module")
def training_run() -> Iterator[TrainingRun]:
    folder = Path(tempfile.mkdtemp(prefix="dn", dir="/tmp"))  # short: socket paths have at most 107 characters
    run = TrainingRun(folder)
    yield run
    run.process.send_signal(signal.SIGTERM)
    code = run.process.wait(WAIT_TIMEOUT_S)
    shutil.rmtree(folder, ignore_errors=True)
    assert code == 143


@contextmanager
def prometheus(targets: list[str], folder: Path) -> Iterator[str]:
    """A Prometheus server on loopback that scrapes these addresses; yields its URL."""
    config = {
        "global": {"scrape_interval": "2s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    options = (f"--web.listen-address={address}", f"--storage.tsdb.path={folder / 'db'}")
    command = [program("prometheus"), f"--config.file={folder / 'prometheus.yml'}", *options]
    with (folder / "prometheus.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def is_ready() -> bool:
        assert server.poll() is None, (folder / "prometheus.log").read_text()
        with suppress(requests.ConnectionError):
            return requests.get(f"http://{address}/-/ready", timeout=30).ok
        return False

    try:
        wait_until(is_ready, (folder / "prometheus.log").read_text)
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait(WAIT_TIMEOUT_S)


def needs_gpu(query: str) -> bool:
    return any(name in query for name in ON_GPUS)


@pytest.mark.slow
def test_a_run_exports_its_metrics(training_run):
    ours = {name for name in EXPORTED if not needs_gpu(name)}
    shown = {name for name in METRIC.findall(" ".join(panel_queries())) if not needs_gpu(name)}

    def missing() -> set[str]:
        training_run.output()
        return (ours | shown) - training_run.exported().keys()

    wait_until(lambda: not missing(), lambda: f"not exported: {missing()}")
    exported = training_run.exported()
    for name in ours:
        (line,) = exported[name]
        assert 'run="demo"' in line


@pytest.mark.slow
def test_prometheus_answers_every_query_of_the_dashboard_and_the_alerts(training_run, tmp_path):
    program("prometheus")
    wait_until(training_run.targets, training_run.output)
    queries = [query.replace("$run", ".+").replace("$__range", "1h") for query in panel_queries()]
    queries += [re.sub(r" > [\d *]+$", "", query) for query in rule_queries()]  # whether or not the alert fires
    with prometheus(training_run.targets(), tmp_path) as url:

        def answer(query: str) -> dict[str, Any]:
            return requests.get(f"{url}/api/v1/query", {"query": query}, timeout=30).json()

        def unanswered() -> list[str]:
            training_run.output()
            answers = {query: answer(query) for query in queries}
            assert not [reply for reply in answers.values() if reply["status"] != "success"]
            return [query for query, reply in answers.items() if not reply["data"]["result"] and not needs_gpu(query)]

        wait_until(lambda: not unanswered(), lambda: "\n".join(unanswered()))
