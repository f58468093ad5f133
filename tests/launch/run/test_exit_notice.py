"""The exit notice prints its message only if its process is killed or ended by Ray's core."""

import subprocess
import sys

import pytest

from tests.conftest import PROJECT

CODE = """
import os, signal
from launch.run.exit_notice import exit_notice
with exit_notice("the process ended"):
    {}
print("after")
"""


@pytest.mark.parametrize(
    ("statement", "printed"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process ended\n"),
        ("os._exit(3)", "the process ended\n"),
        ("pass", "after\n"),
        ("raise SystemExit(2)", ""),
    ],
)
def test_the_notice_is_printed_after_a_kill(statement, printed):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(statement)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.stdout == printed


ENDS_WHILE_RAY_SHUTS_DOWN = """
import os, sys
from contextlib import contextmanager
from pathlib import Path
from rich.console import Console
import launch.cluster.local_ray, launch.cluster.training
from launch.run.train import train_command
from pipeline.errors import TrainingError

@contextmanager
def starting_ray(*arguments):
    try:
        yield lambda: None
    finally:
        os._exit(1)

def run_training(*arguments):
    raise TrainingError("a worker was lost")

launch.cluster.local_ray.starting_ray, launch.cluster.training.run_training = starting_ray, run_training
settings = ["run.name=run", f"run.output={sys.argv[1]}"]
train_command(Console(), Path("configs/demo.yaml"), settings, None, quiet=True)
"""


def test_the_notice_is_printed_if_ray_ends_the_driver_during_shutdown(tmp_path):
    command = [sys.executable, "-c", ENDS_WHILE_RAY_SHUTS_DOWN, str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 1, done.stdout
    assert done.stdout == (
        "training failed: the driver was killed, or Ray's core ended it. The same command with run.name=run resumes "
        "from the latest checkpoint.\n"
    )
