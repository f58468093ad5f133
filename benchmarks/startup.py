"""From the command to the first step: `densenet train` on the demo's data, beside a plain script under torchrun.

    python -m benchmarks.startup [--rounds 3]

Ours starts Ray, an MLflow store and the workers, looks at the data and records the run before it trains; the script
reads a folder and trains. A warm file cache: the first round is not kept.
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

from benchmarks.common import in_turns, keep, report, seconds
from pipeline.data.digits import write_digits

PROJECT = Path(__file__).parents[1]
DENSENET = str(Path(sys.executable).with_name("densenet"))
SCRIPT = "benchmarks/plain_ddp.py"


def main() -> None:
    """Measures the time to the first step, then that of commands which start nothing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder, "digits"))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
        cases = {
            "densenet train": until_step(
                [DENSENET, "train", "configs/demo.yaml", f"run.output={folder}/out", "train.log_every_steps=1"]
            ),
            "torchrun, plain script": until_step([*torchrun, f"{folder}/digits/train"]),
        }
        report("command to first step, the demo on two workers", in_turns(cases, rounds), "s", "densenet train")
        for words in (["--help"], ["plan", "configs/demo.yaml", f"run.output={folder}/out"]):
            times = in_turns({"it": lambda w=words: seconds(lambda: ended([DENSENET, *w]))}, rounds)["it"]  # type: ignore[misc]
            median = statistics.median(times)
            print(f"densenet {words[0]}: {median:.2f} s, median of {rounds}")
            keep("command to its end", f"densenet {words[0]}", median, "s", rounds=rounds)


def ended(command: Sequence[str]) -> None:
    subprocess.run(command, cwd=PROJECT, stdout=subprocess.DEVNULL, check=True)


def until_step(command: Sequence[str]) -> Callable[[], float]:
    """Starts the command, and ends it after its first step; returns the seconds until then."""

    def measured() -> float:
        started = time.perf_counter()
        with subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        ) as process:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if re.search(r"\bstep 1/", line):
                    spent = time.perf_counter() - started
                    process.send_signal(signal.SIGTERM)
                    process.stdout.read()  # until it has ended
                    return spent
        sys.exit(f"{' '.join(command)} has ended without a step:\n{''.join(said)}")

    return measured


if __name__ == "__main__":
    main()
