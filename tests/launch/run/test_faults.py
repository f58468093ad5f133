"""What happens to a whole run when parts of it are killed, as a user sees it."""

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
# More for a long soak: KILLS=20 pytest --timeout=0 tests/launch/run/test_faults.py
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
    """`densenet train` on the demo, with its output so far."""

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
        """Waits for the end; returns the exit code."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def process_of(driver: int, name: str) -> psutil.Process:
    """The process of an embedded Ray, which descends from the driver, with this in its command."""
    family = psutil.Process(driver).children(recursive=True)
    return next(process for process in family if name in " ".join(process.cmdline()[:1]))


def finished(
    output: Path, resume: Path | None = None, overrides: Sequence[str] = (), until: int = 10**9
) -> dict[str, torch.Tensor]:
    """The weights at the end of the same run, or of its rest, without Ray and without problems; or soon after `until`."""
    settings = [*OVERRIDES, *overrides, f"run.output={output}", "device=cpu"]
    config = read_config(PROJECT / "configs" / "demo.yaml", settings)
    seen = 0

    def look(event: Event) -> None:
        nonlocal seen
        seen = getattr(event, "samples_seen", seen)

    prepared = prepare(config, Resources("this machine", 2, 0, embedded=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        indexes = prepared.train_index, prepared.val_index
        options = {"resume": resume, "should_stop": lambda: seen >= until}
        new_trainer(config, prepared.derived, indexes, prepared.run_dir, look, **options).fit()
    finally:
        torch.set_num_threads(threads)
    return load_file(checkpoints(prepared.run_dir / "checkpoints")[-1] / "model.safetensors")


def test_a_killed_worker_and_a_terminated_driver_change_nothing_about_the_end(tmp_path, one_rank):
    folder = tmp_path / "run" / "checkpoints"
    first = Started(tmp_path)
    chance = random.Random(0)
    for kill in range(KILLS):
        there = len(checkpoints(folder))
        first.wait_for(lambda there=there: len(checkpoints(folder)) > there)
        if KILLS > 1:
            time.sleep(chance.uniform(0, 3))  # to kill at any step of an epoch, or while a checkpoint is written
        process_of(first.process.pid, "RayTrainWorker").kill()
        first.wait_for(lambda kill=kill: first.output.count("resumed at") == kill + 1)
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 128 + signal.SIGTERM, first.output
    assert f"warning: a worker was lost, all were started again (start {KILLS + 1})" in first.output
    stopped = re.search(r"stopped by SIGTERM at ([\d,]+) samples, after a checkpoint; .* run.name=run", first.output)
    assert stopped, first.output
    newest = checkpoints(folder)[-1]
    assert int(stopped[1].replace(",", "")) == int(newest.name.removeprefix("samples-"))

    rest, whole = finished(tmp_path / "rest", newest), finished(tmp_path / "whole")
    assert all(torch.equal(rest[key], whole[key]) for key in whole)


def test_a_killed_driver_and_a_lost_ray_change_nothing_about_the_end(tmp_path, one_rank):
    """The same command goes on each time; of the first start's Ray no worker is left."""
    folder, long = tmp_path / "run" / "checkpoints", "train.epochs=99"
    first = Started(tmp_path, long)
    first.wait_for(lambda: checkpoints(folder))
    other = Started(tmp_path, long)
    assert other.end() == 2, other.output
    assert "error: run.name=run is being trained by another process in" in other.output
    worker = process_of(first.process.pid, "RayTrainWorker")
    first.process.kill()
    assert first.end() == -signal.SIGKILL
    assert "training failed: the driver was killed, or Ray's core has ended it. " in first.output
    worker.wait(DEADLINE_S)

    second = Started(tmp_path, long)
    second.wait_for(lambda: "resumed at" in second.output and len(checkpoints(folder)) > 1)
    process_of(second.process.pid, "raylet").kill()
    assert second.end() == 1, second.output
    # Ray's core may end the driver before it can say more; then its exit_notice does.
    reasons = "Ray lost the node that the driver is on, or its own processes there|the driver was killed, or Ray's core"
    assert re.search(rf"^training failed: ({reasons})", second.output, re.MULTILINE), second.output
    assert "The same command with run.name=run goes on from the newest checkpoint." in second.output
    assert "Traceback" not in second.output

    newest = checkpoints(folder)[-1]
    finished(tmp_path / "whole", overrides=[long], until=samples_of(newest))
    same = load_file(tmp_path / "whole" / "run" / "checkpoints" / newest.name / "model.safetensors")
    reached = load_file(newest / "model.safetensors")
    assert all(torch.equal(reached[key], same[key]) for key in same)


def test_a_terminal_that_closes_ends_a_run_after_a_checkpoint_and_one_under_nohup_goes_on(tmp_path):
    """The kernel sends SIGHUP to the driver and to the processes of its Ray, and what is printed then has no place."""

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    def started(name: str, *before: object) -> tuple[subprocess.Popen, int]:
        ours, theirs = os.openpty()
        options = [*OVERRIDES, f"run.output={tmp_path}", f"run.name={name}", "train.epochs=99"]
        command = [*before, BIN / "densenet", "train", PROJECT / "configs/demo.yaml", "--quiet", *options]
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
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert verify(newest) is None
    assert samples_of(newest) % 1437 > 64, "not one of those that come with an epoch's end"

    run, terminal = started("deaf", "nohup")
    try:
        wait_until(has_checkpoints("deaf", 1), lambda: "no checkpoint")
        there = len(checkpoints(tmp_path / "deaf" / "checkpoints"))
        os.close(terminal)
        wait_until(has_checkpoints("deaf", there + 2), lambda: "nohup's run has not gone on")
    finally:
        run.terminate()
        assert run.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_a_tracking_server_that_is_away_for_the_middle_of_a_run_has_everything_at_its_end(tmp_path):
    folder, server = tmp_path / "run" / "checkpoints", MlflowServer(tmp_path)
    try:
        run = Started(tmp_path, f"tracking.uri={server.uri}", "train.epochs=8", "train.log_every_steps=1")
        run.wait_for(lambda: checkpoints(folder))
        server.stop()
        there = len(checkpoints(folder))
        run.wait_for(lambda: len(checkpoints(folder)) > there)
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
