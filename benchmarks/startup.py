"""Startup time to the first training step, by phase: `densenet train` on the demo, and a plain script under torchrun.

    python -m benchmarks.startup [--rounds 3]

`densenet train` starts Ray, opens an MLflow store, checks the data, records the run and starts the workers before it
trains; the script reads a folder and trains. The file cache is warm, because the first round is discarded.
"""

import argparse
import itertools
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import interleaved, report, save_result, seconds
from pipeline.data.digits import write_digits

PROJECT = Path(__file__).parents[1]
DENSENET = str(Path(sys.executable).with_name("densenet"))
SCRIPT = "benchmarks/plain_ddp.py"
STEP = r"\bstep [\d,]+/"
# The phases of `densenet train`, and the line that ends each.
PHASES = {
    "config and data": "^run ",
    "MLflow run, while Ray starts": "^starting Ray",
    "rest of Ray's start": "^starting 2 workers",
    "workers": "^workers started",
    "first step": STEP,
}


def main() -> None:
    """Measures the time to the first step and its phases, a restart, then the run time of `--help` and `plan`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder, "digits"))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
        phases: list[list[float]] = []
        folders = (f"{folder}/new{number}" for number in itertools.count())

        def known_store() -> float:
            phases.append(seconds_to(train_demo(f"{folder}/out"), list(PHASES.values())))
            return phases[-1][-1]

        cases = {
            "densenet train": known_store,
            "new MLflow store": lambda: seconds_to(train_demo(next(folders)), [STEP])[-1],
            "torchrun, plain script": lambda: seconds_to([*torchrun, f"{folder}/digits/train"], [STEP])[-1],
        }
        values = interleaved(cases, rounds)
        new_store = values.pop("new MLflow store")
        report("command to first step, demo, two workers", values, "s", "densenet train")
        save("command to first step, new MLflow store", "densenet train", new_store)
        for number, name in enumerate(PHASES):
            starts = [row[number - 1] if number else 0.0 for row in phases[1:]]
            spent = [row[number] - start for row, start in zip(phases[1:], starts, strict=True)]
            save("phases of the first step, demo", name, spent)
        restart = {"restart": lambda: seconds_to_restart(f"{folder}/out")}
        save("lost worker to next step, demo, two workers", "densenet train", interleaved(restart, rounds)["restart"])
        for arguments in (["--help"], ["plan", "configs/demo.yaml", f"run.output={folder}/out"]):
            case = {"command": lambda a=arguments: seconds(lambda: run([DENSENET, *a]))}  # type: ignore[misc]
            save("command run time", f"densenet {arguments[0]}", interleaved(case, rounds)["command"])


def save(benchmark: str, case: str, values: Sequence[float]) -> None:
    """Prints and saves the median."""
    median = statistics.median(values)
    print(f"{benchmark}, {case}: {median:.2f} s, median of {len(values)}")
    save_result(benchmark, case, median, "s", rounds=len(values))


def train_demo(output: str) -> list[str]:
    return [
        DENSENET,
        "train",
        "configs/demo.yaml",
        f"run.output={output}",
        "train.log_every_steps=1",
        "train.epochs=199",
    ]


def run(command: Sequence[str]) -> None:
    subprocess.run(command, cwd=PROJECT, stdout=subprocess.DEVNULL, check=True)


def seconds_to(
    command: Sequence[str], patterns: Sequence[str], on_first: Callable[[psutil.Process], object] | None = None
) -> list[float]:
    """Returns the seconds from the start of a command to its first lines that match the patterns, in order.

    `on_first` is called at the first of them. Then the command is terminated.
    """
    started, times, output = time.perf_counter(), list[float](), list[str]()
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "bufsize": 1}
    with subprocess.Popen(command, cwd=PROJECT, **options) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if re.search(patterns[len(times)], line):
                times.append(time.perf_counter() - started)
                if on_first is not None and len(times) == 1:
                    on_first(psutil.Process(process.pid))
            if len(times) == len(patterns):
                process.send_signal(signal.SIGTERM)
                process.stdout.read()  # until the process ends
                return times
    sys.exit(f"{' '.join(command)} ended before a line {patterns[len(times)]}:\n{''.join(output)}")


def seconds_to_restart(output: str) -> float:
    """Kills a worker after ten epochs, when it has a spare; returns the seconds to the first step after the restart."""

    def kill_worker(driver: psutil.Process) -> None:
        next(p for p in driver.children(recursive=True) if "RayTrainWorker" in p.cmdline()[0]).kill()

    killed, _, step = seconds_to(train_demo(output), [r"^epoch 1\d\.", "was lost", STEP], kill_worker)
    return step - killed


if __name__ == "__main__":
    main()
