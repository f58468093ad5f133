"""The local Ray of a run: what it starts, in which processes the run trains, and that nothing is left of it."""

import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial

import psutil
import pytest

from launch.cluster.connect import run_test_task
from launch.cluster.local_ray import embedded_ray
from launch.cluster.ports import free_port, is_reachable
from tests.conftest import BIN, PROJECT
from tests.launch.conftest import WAIT_TIMEOUT_S, wait_until

pytestmark = pytest.mark.slow

DEMO = [PROJECT / "configs" / "demo.yaml", "run.name=run"]


def children(parent: psutil.Process, title: str = "") -> list[psutil.Process]:
    """Returns the child processes, at any depth, with `title` in their command line."""
    found = []
    for process in parent.children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def assert_ended(processes: list[psutil.Process]) -> None:
    assert not psutil.wait_procs(processes, WAIT_TIMEOUT_S)[1]


def test_a_dashboard_runs_only_on_a_port_that_was_asked_for(tmp_path):
    this, log, port = psutil.Process(), tmp_path / "logs" / "ray.log", free_port()
    before = set(children(this))
    with embedded_ray(1, log) as dashboard:
        assert dashboard is None
        assert run_test_task() != this.pid
        first = [process for process in children(this) if process not in before]
        assert not children(this, "dashboard.py")
    assert_ended(first)
    with embedded_ray(1, log, port) as dashboard:
        assert dashboard == f"http://127.0.0.1:{port}"
        assert is_reachable("127.0.0.1", port, 5)
        second = [process for process in children(this) if process not in before]
    assert_ended(second)
    assert "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S" not in os.environ


def test_all_processes_are_forks_also_after_a_worker_was_lost(tmp_path):
    settings = ["train.epochs=9999", "train.log_every_steps=1", "cluster.workers=1", f"run.output={tmp_path}"]
    log = tmp_path / "log"
    with log.open("w") as output:
        run = subprocess.Popen([BIN / "densenet", "train", *DEMO, *settings], cwd=PROJECT, stdout=output)
    driver = psutil.Process(run.pid)

    def is_training() -> bool:
        assert run.poll() is None, log.read_text()
        return "step 1/" in log.read_text()

    try:
        wait_until(is_training, log.read_text)
        (first,) = children(driver, "RayTrainWorker")
        (controller,) = children(driver, "TrainController")
        server = first.parent()
        assert controller.parent() == server.parent()
        assert server.parent().parent() == driver
        assert not children(driver, "ray::IDLE")
        first.kill()
        wait_until(lambda: "all workers were restarted (start 2)" in log.read_text(), log.read_text)
        (second,) = children(driver, "RayTrainWorker")
        assert second.parent() == server
    finally:
        run.terminate()
        code = run.wait(WAIT_TIMEOUT_S)
    assert code == 128 + signal.SIGTERM, log.read_text()


@pytest.mark.long
def test_workers_with_variables_of_the_user_are_not_forked(tmp_path):
    few = ["train.epochs=0.1", "schedule.warmup_epochs=0", "cluster.workers=1", "cluster.env={NAME: größer}"]
    command = [BIN / "densenet", "train", *DEMO, *few, f"run.output={tmp_path}"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("workers started"):
                (worker,) = children(psutil.Process(run.pid), "RayTrainWorker")
                parent, variables = worker.parent().cmdline()[0], worker.environ()
    assert run.returncode == 0
    assert parent.endswith("raylet")
    assert variables["NAME"] == "größer"


def test_an_unusable_store_ends_the_start_of_ray_with_nothing_but_the_error(densenet, tmp_path):
    store = tmp_path / "store"
    store.write_text("no database")
    before = children(psutil.Process())
    settings = [*DEMO, f"run.output={tmp_path / 'out'}", f"tracking.uri=sqlite:///{store}"]
    code, output = densenet("train", "--quiet", *settings)
    assert code == 2
    assert output.startswith(f"error: sqlite:///{store} is not a SQLite database")
    assert_ended([process for process in children(psutil.Process()) if process not in before])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_during_the_start_leaves_no_process(tmp_path, number, code):
    command = [BIN / "densenet", "train", *DEMO, f"run.output={tmp_path}"]
    default_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # child processes of xdist ignore SIGINT
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(command, cwd=PROJECT, start_new_session=True, preexec_fn=default_sigint, **pipes)
    driver, found = psutil.Process(run.pid), []

    def appears(title: str) -> Callable[[], bool]:
        def check() -> bool:
            assert run.poll() is None
            found[:] = children(driver)
            return bool(children(driver, title))

        return check

    wait_until(appears("raylet/raylet"), lambda: f"no raylet: {found}")
    run.send_signal(number)
    output, _ = run.communicate(timeout=WAIT_TIMEOUT_S)
    assert run.returncode == code, output
    assert f"ended by {number.name}" in output
    assert "Traceback" not in output
    assert_ended(found)


def test_the_driver_imports_neither_torch_nor_matplotlib_before_it_trains():
    code = (
        "import sys, launch.run.train, launch.cluster.local_ray, launch.cluster.training, pipeline.export.tracked\n"
        "print(*sorted({'torch', 'timm', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([BIN / "python", "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
