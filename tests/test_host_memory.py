"""Freed memory is reused. A child process measures it, because the setting holds for the rest of a process."""

import subprocess
import sys

import pytest

_COST_OF_THE_LAST_BLOCK = """
import resource, sys
import torch
from pipeline.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.zeros(16_000_000)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("setting", "low", "high"), [("keep", 0, 2_000), ("default", 10_000, 20_000)])
def test_a_large_block_that_was_freed_is_reused(setting: str, low: int, high: int):
    command = [sys.executable, "-c", _COST_OF_THE_LAST_BLOCK, setting]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert low <= int(done.stdout) <= high
