"""Startup time to the first training step: `densenet train` on the demo's data, and a plain script under torchrun.

    python -m benchmarks.startup [--rounds 3]

`densenet train` starts Ray, an MLflow store and the workers, checks the data and records the run before it trains; the
script reads a folder and trains. The file cache is warm, because the first round is discarded.
"""

import argparse
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import interleaved, report, save_result, seconds
from pipeline.data.digits import write_digits

PROJECT = Path(__file__).parents[1]
DENSENET = str(Path(sys.executable).with_name("densenet"))
SCRIPT = "benchmarks/plain_ddp.py"


def main() -> None:
    """Measures the time to the first step, then the run time of `--help` and `plan`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder, "digits"))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
        cases = {
            "densenet train": time_to_first_step(
                [DENSENET, "train", "configs/demo.yaml", f"run.output={folder}/out", "train.log_every_steps=1"]
            ),
            "torchrun, plain script": time_to_first_step([*torchrun, f"{folder}/digits/train"]),
        }
        report("command to first step, demo, two workers", interleaved(cases, rounds), "s", "densenet train")
        for arguments in (["--help"], ["plan", "configs/demo.yaml", f"run.output={folder}/out"]):
            case = {"command": lambda a=arguments: seconds(lambda: run([DENSENET, *a]))}  # type: ignore[misc]
            median = statistics.median(interleaved(case, rounds)["command"])
            print(f"densenet {arguments[0]}: {median:.2f} s, median of {rounds}")
            save_result("command run time", f"densenet {arguments[0]}", median, "s", rounds=rounds)


def run(command: Sequence[str]) -> None:
    subprocess.run(command, cwd=PROJECT, stdout=subprocess.DEVNULL, check=True)


def time_to_first_step(command: Sequence[str]) -> Callable[[], float]:
    """Returns a function that measures the seconds to the command's first step, and then terminates the command."""

    def measured() -> float:
        started = time.perf_counter()
        with subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        ) as process:
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                output.append(line)
                if re.search(r"\bstep 1/", line):
                    elapsed = time.perf_counter() - started
                    process.send_signal(signal.SIGTERM)
                    process.stdout.read()  # until the process ends
                    return elapsed
        sys.exit(f"{' '.join(command)} ended without a training step:\n{''.join(output)}")

    return measured


if __name__ == "__main__":
    main()
