"""The witness speaks when its process is killed, and is silent when that goes on or ends by itself."""

import subprocess
import sys

import pytest

CODE = "import os, signal\nfrom launch.witness import witness\nwith witness('it is gone'):\n    {}\nprint('after')"


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
