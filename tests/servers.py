"""Real servers on loopback for tests: MLflow's, and an S3 store."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import requests

from launch.net import free_port

PATIENCE_S = 120


class MlflowServer:
    """A real `mlflow server` on loopback that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        log = (self.folder / "server.log").open("a")
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        log.close()
        self._wait(up=True)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._wait(up=False)

    def _wait(self, up: bool) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self._is_up() != up:
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.1)

    def _is_up(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=5).ok
        except requests.ConnectionError:
            return False


@contextmanager
def s3_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 store with an empty bucket `bucket`, which fsspec finds by the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        requests.post(f"http://{host}:{port}/moto-api/reset", timeout=10)  # its buckets outlive a server in a process
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.clear_instance_cache()  # of an earlier store
        files.mkdir("bucket")
        yield
    finally:
        server.stop()
