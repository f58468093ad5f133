"""Real servers on loopback for tests: MLflow's, PostgreSQL, and an S3 store."""

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fsspec
import pytest
import requests

from launch.cluster.ports import free_port
from tests.conftest import BIN

PATIENCE_S = 120


class MlflowServer:
    """A real `mlflow server` on loopback that can be stopped and restarted; on SQLite unless `backend` is passed."""

    def __init__(
        self,
        folder: Path,
        backend: str | None = None,
        options: Sequence[str] = (),
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        store = ("--backend-store-uri", backend or f"sqlite:///{folder}/server.db", "--workers", "1")
        bind = ("--host", "127.0.0.1", "--port", str(self.port))
        self._command = [sys.executable, "-m", "mlflow", "server", *bind, *store, *options]
        self.env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | dict(env)
        self.start()

    def start(self) -> None:
        log = (self.folder / "server.log").open("a")
        self.process = subprocess.Popen(
            self._command, cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
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
            assert not up or self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.1)

    def _is_up(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=5).ok
        except requests.RequestException:  # also a timeout on a busy machine
            return False


class UnreliableDownloads:
    """A layer in front of an S3 store that delays downloads of shards, breaks some, and counts them.

    `error_of` gets a shard's name and how often it was requested, and returns "500", "reset" (of the connection),
    "truncated", or None.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.error_of: Callable[[str, int], str | None] = lambda name, request: None
        self.requests: Counter[str] = Counter()
        self.application: Any = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Answers a request, by WSGI."""
        name = environ["PATH_INFO"].rpartition("/")[2]
        if environ["REQUEST_METHOD"] != "GET" or not re.search(r"\d\.(tar|parquet)\Z", name):
            return self.application(environ, start_response)
        self.requests[name] += 1
        threading.Event().wait(self.delay_s)
        error = self.error_of(name, self.requests[name])
        if error == "500":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        if error == "reset":
            no_linger = struct.pack("ii", 1, 0)
            environ["werkzeug.socket"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
            raise ConnectionResetError  # the server closes the connection
        content = self.application(environ, start_response)
        return _half(b"".join(content)) if error == "truncated" else content


def _half(content: bytes) -> Iterator[bytes]:
    yield content[: len(content) // 2]
    raise ConnectionResetError  # the server closes the connection


@contextmanager
def s3_store(monkeypatch: pytest.MonkeyPatch, downloads: UnreliableDownloads | None = None) -> Iterator[None]:
    """An S3 store with an empty bucket `bucket`, which fsspec finds through environment variables."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    if downloads is not None:
        assert server._server is not None
        downloads.application, server._server.app = server._server.app, downloads
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        requests.post(
            f"http://{host}:{port}/moto-api/reset", timeout=10
        )  # buckets persist in the process after a server stops
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.clear_instance_cache()  # cached for an earlier store
        files.mkdir("bucket")
        yield
    finally:
        server.stop()


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server of Debian's on loopback with an empty database; yields its URI."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not programs:
        pytest.skip("there is no PostgreSQL server on this machine (Debian's package postgresql)")
    program, port = programs[-1].parent, free_port()
    root = os.geteuid() == 0
    user = ["runuser", "-u", "postgres", "--"] if root else []  # it refuses to run as root
    data = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    if root:
        shutil.chown(data, "postgres", "postgres")
    try:
        initdb = [program / "initdb", "-D", data / "db", "-U", "postgres", "-A", "trust", "--no-sync"]
        subprocess.run([*user, *initdb], check=True, capture_output=True, cwd=data)
        options = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data} -c fsync=off"
        control = [*user, program / "pg_ctl", "-D", data / "db", "-l", data / "log", "-w"]
        subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd=data)
        try:
            connection = ["-h", "127.0.0.1", "-p", str(port), "-U", "postgres"]
            subprocess.run([program / "createdb", *connection, "mlflow"], check=True)
            yield f"postgresql://postgres@127.0.0.1:{port}/mlflow"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, cwd=data)
    finally:
        shutil.rmtree(data, ignore_errors=True)
