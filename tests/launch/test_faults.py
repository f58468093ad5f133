"""What happens to a whole run when parts of it are killed, as a user sees it."""

import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.prepare import prepare, read_config
from launch.resources import Resources
from pipeline.train.checkpoint import checkpoints
from pipeline.train.trainer import Trainer
from tests.conftest import BIN, PROJECT

pytestmark = pytest.mark.slow
DEADLINE_S = 300
# More for a long soak: KILLS=20 pytest --timeout=0 tests/launch/test_faults.py
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

    def __init__(self, output: Path) -> None:
        command = [BIN / "densenet", "train", "configs/demo.yaml", *OVERRIDES, f"run.output={output}"]
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


def worker_of(driver: int) -> int:
    """The process id of the training worker of an embedded Ray, which descends from the driver."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()[1:]]
    family = {driver}
    for _ in range(4):
        family |= {int(pid) for pid, parent, _ in rows if int(parent) in family}
    return next(int(pid) for pid, _, args in rows if int(pid) in family and "RayTrainWorker" in args)


def finished(output: Path, resume: Path | None = None) -> dict[str, torch.Tensor]:
    """The weights at the end of the same run, or of its rest, without Ray and without a fault."""
    config = read_config(PROJECT / "configs" / "demo.yaml", [*OVERRIDES, f"run.output={output}", "device=cpu"])
    prepared = prepare(config, Resources("this machine", 2, 0, embedded=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        indexes = prepared.train_index, prepared.val_index
        cpu = torch.device("cpu")
        Trainer(config, prepared.derived, *indexes, prepared.run_dir, cpu, lambda event: None, resume=resume).fit()
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
        os.kill(worker_of(first.process.pid), signal.SIGKILL)
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
