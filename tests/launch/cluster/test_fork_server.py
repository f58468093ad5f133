"""The fork server: what a forked process has of its own, what it has imported, and who ends it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.cluster import forked_worker
from launch.cluster.allocation import Allocation
from launch.cluster.fork_server import fork_server, worker_env
from pipeline.config import RunConfig

_TIMEOUT_S = 120

# Stands for Ray's `default_worker.py`.
WORKER = """
import json, os, sys
import numpy as np
from ray._raylet import ActorClassID
print(json.dumps({
    "argv": sys.argv[1:], "variable": os.environ.get("VARIABLE"), "cwd": os.getcwd(), "pid": os.getpid(),
    "group": os.getpgid(0), "torch": "torch" in sys.modules, "deepspeed": "deepspeed" in sys.modules,
    "id": ActorClassID.from_random().hex(), "random": np.random.random(),
}))
"""
# Stands for Ray's `setup_worker.py`, which is started without a fork server.
SETUP = "import sys; print('setup_worker', *sys.argv[1:])"


@pytest.fixture
def programs(tmp_path) -> Path:
    """A folder with the two programs of Ray."""
    (tmp_path / "default_worker.py").write_text(WORKER)
    (tmp_path / "setup_worker.py").write_text(SETUP)
    return tmp_path


def start(programs: Path, socket: str | None = None, job: str = forked_worker.JOB_ID, **context: object) -> str:
    """Starts a worker as Ray's core does, and returns its output."""
    variables = {"VARIABLE": "of the worker"} | ({forked_worker.SOCKET: socket} if socket is not None else {})
    context = {"env_vars": variables, "py_executable": sys.executable, "command_prefix": []} | context
    done = subprocess.run(
        [
            sys.executable,
            forked_worker.__file__,
            str(programs / "default_worker.py"),
            "--worker-id=1",
            "--language=PYTHON",
            f"--serialized-runtime-env-context={json.dumps(context)}",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=programs,
        env=os.environ | {"RAY_JOB_ID": job},
        timeout=_TIMEOUT_S,
    )
    return done.stdout


def allocation(**fields: object) -> Allocation:
    return Allocation(**({"device": "cpu", "workers": 1, "bounds": (1, 1), "cpus_per_worker": 1, "embedded": True,
                          "warnings": ()} | fields))  # fmt: skip


def test_forks_have_all_that_differs_between_processes(programs):
    with fork_server("cpu", programs / "log"):
        socket = worker_env(RunConfig.model_validate({}), allocation())[forked_worker.SOCKET]
        first, second = (json.loads(start(programs, socket)) for _ in range(2))
        actor = json.loads(start(programs))
    assert first["argv"] == ["--worker-id=1"]
    assert first["variable"] == "of the worker"
    assert first["cwd"] == str(programs)
    for worker in (first, second, actor):
        assert worker["group"] == worker["pid"]
    assert len({worker[key] for worker in (first, second, actor) for key in ("pid", "id", "random")}) == 9
    assert first["torch"] and first["deepspeed"]
    assert not actor["torch"]


def test_workers_on_gpus_are_forked_without_torch(programs):
    with fork_server("cuda", programs / "log"):
        assert worker_env(RunConfig.model_validate({}), allocation(device="cuda")) == {}
        assert not json.loads(start(programs))["torch"]


def test_variables_of_the_user_start_a_new_interpreter(programs):
    config = RunConfig.model_validate({"cluster": {"env": {"OMP_NUM_THREADS": "3"}}})
    with fork_server("cpu", programs / "log"):
        env = worker_env(config, allocation())
        assert env["OMP_NUM_THREADS"] == "3"
        assert start(programs, env[forked_worker.SOCKET]).startswith("setup_worker")
    assert worker_env(config, allocation()) == worker_env(config, allocation(embedded=False)) == config.cluster.env


@pytest.mark.parametrize(
    "different",
    [
        {"job": "02000000"},  # Ray's core knows the job from the fork server
        {"py_executable": "/usr/bin/env python"},
        {"command_prefix": ["true", "&&"]},
        {"override_worker_entrypoint": "/other/default_worker.py"},
        {"socket": "/no/server"},
    ],
    ids=str,
)
def test_other_workers_are_started_by_ray(programs, different):
    with fork_server("cuda", programs / "log"):
        assert start(programs, **different).startswith(f"setup_worker {programs}/default_worker.py --worker-id=1")


def test_a_long_temporary_folder(programs, monkeypatch):
    folder = programs / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with fork_server("cuda", programs / "log"):
        assert json.loads(start(programs))["argv"] == ["--worker-id=1"]


def test_it_ends_with_a_driver_that_is_killed(programs):
    code = """if True:
        import pathlib, signal, sys
        from launch.cluster.fork_server import fork_server
        with fork_server("cpu", pathlib.Path(sys.argv[1])):
            print("started", flush=True)
            signal.pause()
    """
    command = [sys.executable, "-c", code, str(programs / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "started\n"
        servers = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGKILL)
    assert servers
    assert not psutil.wait_procs(servers, _TIMEOUT_S)[1]
