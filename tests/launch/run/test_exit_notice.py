"""The exit_notice speaks when its process is killed, and is silent when that goes on or ends by itself."""

import subprocess
import sys

import pytest

from tests.conftest import PROJECT

CODE = "import os, signal\nfrom launch.run.exit_notice import exit_notice\nwith exit_notice('it is gone'):\n    {}\nprint('after')"


@pytest.mark.parametrize(
    ("inside", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "it is gone\n"),
        ("os._exit(3)", "it is gone\n"),
        ("pass", "after\n"),
        ("raise SystemExit(2)", ""),
    ],
)
def test_what_is_said_at_the_end(inside, told):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(inside)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.stdout == told


ENDS_WHILE_RAY_SHUTS_DOWN = """
import os, sys
from contextlib import contextmanager
from pathlib import Path
from rich.console import Console
import launch.cluster.connect, launch.cluster.training
from launch.run.train import train_command
from pipeline.errors import TrainingError

@contextmanager
def embedded(*arguments):
    try:
        yield "http://127.0.0.1"
    finally:
        os._exit(1)

def run(*arguments):
    raise TrainingError("a worker was lost")

launch.cluster.connect.embedded, launch.cluster.training.run = embedded, run
settings = ["run.name=run", f"run.output={sys.argv[1]}"]
train_command(Console(), Path("configs/demo.yaml"), settings, None, quiet=True)
"""


def test_a_driver_that_ray_ends_while_its_error_is_on_the_way_out_is_told_of(tmp_path):
    command = [sys.executable, "-c", ENDS_WHILE_RAY_SHUTS_DOWN, str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 1, done.stdout
    said = (
        "the driver was killed, or Ray's core has ended it. The same command with run.name=run goes on from the newest"
    )
    assert done.stdout == f"training failed: {said} checkpoint.\n"
