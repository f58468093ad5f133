"""`densenet ui`: the MLflow UI on loopback."""

import os
import signal
import subprocess
import time

import pytest
import requests

from launch.cluster.ports import free_port
from pipeline.config import RunConfig
from pipeline.tracking.client import connect
from pipeline.tracking.stores import stores_from_config
from tests.conftest import BIN
from tests.launch.conftest import WAIT_TIMEOUT_S

pytestmark = pytest.mark.slow


def test_the_ui_shows_the_runs_of_a_sqlite_file(tmp_path):
    uri = stores_from_config(RunConfig.model_validate({"run": {"output": str(tmp_path)}})).tracking
    connect(uri).create_experiment("visible")
    port = free_port()
    with (tmp_path / "ui.log").open("w") as log:
        ui = subprocess.Popen(
            [BIN / "densenet", "ui", "--port", str(port), "--uri", uri],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while True:
            try:
                page = requests.get(f"http://127.0.0.1:{port}/", timeout=5)
                break
            except requests.ConnectionError:
                assert ui.poll() is None and time.monotonic() < deadline, (tmp_path / "ui.log").read_text()
                time.sleep(0.2)
        assert page.ok
        assert "MLflow" in page.text
        found = requests.post(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search", json={"max_results": 9}, timeout=30
        ).json()
        assert "visible" in [experiment["name"] for experiment in found["experiments"]]
    finally:
        os.killpg(ui.pid, signal.SIGKILL)
        ui.wait()
