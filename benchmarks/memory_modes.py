"""Training step time and peak memory with activation checkpointing and the other memory modes, on CUDA or the CPU.

python -m benchmarks.memory_modes [--models densenet121 densenet264] [--batch 8] [--rounds 3]

Each case runs in its own process. On the CPU, memory is the growth of the peak resident set size during the steps
(including the allocator's cache); on CUDA, it is the peak of torch's allocated memory.
"""

import argparse
import json
import resource
import subprocess
import sys
from typing import get_args

import torch
import torch.nn.functional as F

from benchmarks.common import report, seconds
from pipeline.config import Model
from pipeline.config_fields import MemoryMode
from pipeline.model.densenet import create

MODES = get_args(MemoryMode)


def main() -> None:
    """Runs every model in every memory mode, and compares each mode with `none`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["densenet121", "densenet264"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(*options.case, options.batch, options.rounds)))
        return
    for name in options.models:
        results: dict[str, tuple[list[float], float]] = {}
        for mode in MODES:
            arguments = ["--case", name, mode, "--batch", str(options.batch), "--rounds", str(options.rounds)]
            command = [sys.executable, "-m", "benchmarks.memory_modes", *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[mode] = tuple(json.loads(done.stdout.splitlines()[-1]))
        for mode in MODES[1:]:
            settings = f"{name}, model.memory={mode}, batch {options.batch} at 224 px"
            report(f"training step, {settings}", {m: results[m][0] for m in (mode, "none")}, "s", mode)
            report(f"peak memory, {settings}", {m: [results[m][1]] for m in (mode, "none")}, "MB", mode)


def measured(name: str, mode: str, batch: int, rounds: int) -> tuple[list[float], float]:
    """Returns the seconds of each step after the first, and the peak memory of all steps in MB."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create(Model.model_validate({"name": name, "memory": mode}), 1000).to(device)
    images_NCHW = torch.randn(batch, 3, 224, 224, device=device)
    labels_N = torch.randint(0, 1000, (batch,), device=device)
    before_mb = _peak_mb(device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images_NCHW), labels_N).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    times = [seconds(step) for _ in range(rounds)]
    return times, _peak_mb(device) - before_mb


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
