"""Fault tolerance of complete runs: killed workers, drivers and Ray processes, closed terminals, lost trackers."""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from launch.cluster.allocation import Resources
from launch.run.prepare import prepare, read_config
from pipeline.train.checkpoint import checkpoints, samples_of, verify
from pipeline.train.events import Event
from tests.conftest import BIN, PROJECT
from tests.launch.conftest import wait_until
from tests.servers import MlflowServer
from tests.train.settings import new_trainer

pytestmark = [pytest.mark.slow, pytest.mark.long]
DEADLINE_S = 300
# For a soak test: KILLS=20 pytest --timeout=0 tests/launch/run/test_failures.py
KILLS = int(os.environ.get("KILLS", "1"))
OVERRIDES = [
    f"train.epochs={KILLS + 3}",
    f"cluster.max_failures={KILLS}",
    "cluster.workers=1",
    "cluster.cpus_per_worker=1",
    "run.name=run",
    "checkpoint.keep_last=99",
]


class Started:
    """A running `densenet train` on the demo, and its output so far."""

    def __init__(self, output: Path, *overrides: str) -> None:
        command = [BIN / "densenet", "train", "configs/demo.yaml", *OVERRIDES, *overrides, f"run.output={output}"]
        self.process = subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def end(self) -> int:
        """Waits until the process ends; returns its exit code."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def process_of(driver: int, name: str) -> psutil.Process:
    """Returns a process of the driver's embedded Ray by its title."""
    family = psutil.Process(driver).children(recursive=True)
    return next(process for process in family if name in " ".join(process.cmdline()[:1]))


def trained_without_failures(
    output: Path, resume: Path | None = None, overrides: Sequence[str] = (), until: int = 10**9
) -> dict[str, torch.Tensor]:
    """Trains the same run without Ray and failures, from its start or `resume`, to its end or soon after `until`.

    Returns:
        The weights.
    """
    settings = [*OVERRIDES, *overrides, f"run.output={output}", "device=cpu"]
    config = read_config(PROJECT / "configs" / "demo.yaml", settings)
    seen = 0

    def on_event(event: Event) -> None:
        nonlocal seen
        seen = getattr(event, "samples_seen", seen)

    prepared = prepare(config, Resources("this machine", 2, 0, embedded=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        indexes = prepared.train_index, prepared.val_index
        options = {"resume": resume, "should_stop": lambda: seen >= until}
        new_trainer(config, prepared.derived, indexes, prepared.run_dir, on_event, **options).fit()
    finally:
        torch.set_num_threads(threads)
    return load_file(checkpoints(prepared.run_dir / "checkpoints")[-1] / "model.safetensors")


def test_a_killed_worker_and_a_terminated_driver_do_not_change_the_weights(tmp_path, one_rank):
    folder = tmp_path / "run" / "checkpoints"
    first = Started(tmp_path)
    chance = random.Random(0)
    for kill in range(KILLS):
        before = len(checkpoints(folder))
        first.wait_for(lambda before=before: len(checkpoints(folder)) > before)
        if KILLS > 1:
            time.sleep(chance.uniform(0, 3))  # to kill at any step of an epoch, or while a checkpoint is written
        process_of(first.process.pid, "RayTrainWorker").kill()
        first.wait_for(lambda kill=kill: first.output.count("resumed at") == kill + 1)
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 128 + signal.SIGTERM, first.output
    assert f"warning: a worker was lost: all workers were restarted (start {KILLS + 1})" in first.output
    stopped = re.search(r"stopped by SIGTERM at ([\d,]+) samples, after a checkpoint; .* run.name=run", first.output)
    assert stopped, first.output
    latest = checkpoints(folder)[-1]
    assert int(stopped[1].replace(",", "")) == int(latest.name.removeprefix("samples-"))

    resumed = trained_without_failures(tmp_path / "rest", latest)
    whole = trained_without_failures(tmp_path / "whole")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_killed_driver_and_a_lost_ray_do_not_change_the_weights(tmp_path, one_rank):
    """The same command resumes each time; no worker of the first start is left."""
    folder, long = tmp_path / "run" / "checkpoints", "train.epochs=99"
    first = Started(tmp_path, long)
    first.wait_for(lambda: checkpoints(folder))
    other = Started(tmp_path, long)
    assert other.end() == 2, other.output
    assert "error: run.name=run is being trained by another process in" in other.output
    worker = process_of(first.process.pid, "RayTrainWorker")
    first.process.kill()
    assert first.end() == -signal.SIGKILL
    assert "training failed: the driver was killed, or Ray's core ended it. " in first.output
    worker.wait(DEADLINE_S)

    second = Started(tmp_path, long)
    second.wait_for(lambda: "resumed at" in second.output and len(checkpoints(folder)) > 1)
    process_of(second.process.pid, "raylet").kill()
    assert second.end() == 1, second.output
    # Ray's core may end the driver before it prints its error; then the exit notice does.
    reasons = "Ray lost the node that the driver is on, or its own processes there|the driver was killed, or Ray's core"
    assert re.search(rf"^training failed: ({reasons})", second.output, re.MULTILINE), second.output
    assert "The same command with run.name=run resumes from the latest checkpoint." in second.output
    assert "Traceback" not in second.output

    latest = checkpoints(folder)[-1]
    trained_without_failures(tmp_path / "whole", overrides=[long], until=samples_of(latest))
    expected = load_file(tmp_path / "whole" / "run" / "checkpoints" / latest.name / "model.safetensors")
    actual = load_file(latest / "model.safetensors")
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_closed_terminal_ends_a_run_after_a_checkpoint_but_not_under_nohup(tmp_path):
    """The kernel sends SIGHUP to the driver and to the processes of its Ray; later output is lost."""

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    def started(name: str, *prefix: object) -> tuple[subprocess.Popen, int]:
        ours, theirs = os.openpty()
        options = [*OVERRIDES, f"run.output={tmp_path}", f"run.name={name}", "train.epochs=99"]
        command = [*prefix, BIN / "densenet", "train", PROJECT / "configs/demo.yaml", "--quiet", *options]
        own_terminal = {"start_new_session": True, "preexec_fn": take_terminal}
        files = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        process = subprocess.Popen(command, cwd=tmp_path, **files, **own_terminal)
        os.close(theirs)
        return process, ours

    def has_checkpoints(name: str, count: int) -> Callable[[], bool]:
        return lambda: len(checkpoints(tmp_path / name / "checkpoints")) >= count

    run, terminal = started("run")
    wait_until(has_checkpoints("run", 1), lambda: "no checkpoint")
    worker = process_of(run.pid, "RayTrainWorker")
    os.close(terminal)
    assert run.wait(DEADLINE_S) == 128 + signal.SIGHUP
    worker.wait(DEADLINE_S)
    latest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert verify(latest) is None
    assert samples_of(latest) % 1437 > 64, "not a checkpoint of an epoch's end"

    run, terminal = started("nohup-run", "nohup")
    try:
        wait_until(has_checkpoints("nohup-run", 1), lambda: "no checkpoint")
        before = len(checkpoints(tmp_path / "nohup-run" / "checkpoints"))
        os.close(terminal)
        wait_until(has_checkpoints("nohup-run", before + 2), lambda: "the run under nohup has stopped")
    finally:
        run.terminate()
        assert run.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_a_tracking_server_that_is_unreachable_in_mid_run_gets_all_records(tmp_path):
    folder, server = tmp_path / "run" / "checkpoints", MlflowServer(tmp_path)
    try:
        run = Started(tmp_path, f"tracking.uri={server.uri}", "train.epochs=8", "train.log_every_steps=1")
        run.wait_for(lambda: checkpoints(folder))
        server.stop()
        before = len(checkpoints(folder))
        run.wait_for(lambda: len(checkpoints(folder)) > before)
        server.start()
        assert run.end() == 0, run.output
        client = MlflowClient(server.uri)
        run_id = json.loads((tmp_path / "run" / "mlflow_run.json").read_text())["run_id"]
        records = [json.loads(line) for line in (tmp_path / "run" / "tracking.jsonl").read_text().splitlines()]
        records = [record for record in records if record["kind"] == "metrics"]
        for key in ("train/loss", "val/top1"):
            logged = [(m.step, m.value) for m in client.get_metric_history(run_id, key)]
            assert logged == [(r["samples_seen"], r["values"][key]) for r in records if key in r["values"]]
        assert len([record for record in records if "train/loss" in record["values"]]) == 180
        assert client.get_run(run_id).info.status == "FINISHED"
    finally:
        server.stop()
