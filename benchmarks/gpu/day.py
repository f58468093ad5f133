"""Unpacks a kit and runs the steps of `benchmarks.gpu.steps`, most valuable first, each in a process with a time limit.

    python -m benchmarks.gpu [STEP...] [--kit outputs/gpu-kit] [--output outputs/gpu] [--seconds 540] [--tiny]
        [--images FOLDER] [--cifar FOLDER]

OUTPUT/results.jsonl and results.csv grow while the steps run; `log.txt` has what they print. `python -m benchmarks.page
OUTPUT/results.csv` adds the rows to the page of benchmarks. Without --kit, the installed packages are used. `--tiny`
tests the steps on a CPU. Needs only the standard library, so that a missing package fails one step and not all.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.unpack import KitError, Unpacked, unpack

PROJECT = Path(__file__).parents[2]
SECONDS = 540
TINY_LIMIT = 4  # times the limit on a GPU
SHORTEST_S = 15  # no step starts with less time left
PACKAGES = ("training", "ray", "mlflow")  # tiers of packages, not of data


@dataclass(frozen=True)
class Step:
    """A step: its time limit on a GPU, and the tiers of the kit that it needs; without `required` nothing else runs."""

    name: str
    limit_s: float
    tiers: tuple[str, ...] = ("training",)
    required: bool = False


STEPS = (
    Step("environment", 30, (), required=True),
    Step("decode", 90),
    Step("zero", 90),
    Step("throughput", 110),
    Step("feed", 110),
    Step("resume", 60),
    Step("cifar", 140, ("training", "cifar")),
    Step("train", 120, ("training", "ray", "mlflow")),
    Step("fused", 45),
    Step("memory", 75),
    Step("switches", 60),
    Step("compile", 180),
    Step("two_gpus", 90),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a step: `ok`, `failed`, `timeout` or `skipped`, with the reason of all but the first."""

    step: str
    status: str
    reason: str = ""
    seconds: float = 0


def main() -> None:
    """Unpacks, runs the steps and prints their outcomes; exits with 1 if one failed."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(step.name for step in STEPS))
    parser.add_argument("--kit", type=Path)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit for everything, unpacking included")
    parser.add_argument("--images", type=Path, help="folder of JPEGs; synthetic images by default")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10, prepared or in class folders")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps on the CPU")
    options = parser.parse_args()
    unknown = [name for name in options.steps if name not in {step.name for step in STEPS}]
    if unknown:
        parser.error(f"{', '.join(unknown)} is unknown: use {', '.join(step.name for step in STEPS)}.")
    steps = [step for step in STEPS if not options.steps or step.name in options.steps]
    if options.tiny:
        steps = [replace(step, limit_s=TINY_LIMIT * step.limit_s) for step in steps]
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    unpacked = None
    if options.kit is not None:
        try:
            unpacked = unpack(options.kit)
        except KitError as error:
            sys.exit(f"error: {error}")
        for tier, problem in unpacked.problems.items():
            print(f"{tier}: {problem}", flush=True)
    data = {"images": options.images, "cifar": options.cifar}
    if unpacked is not None:
        data = {name: path or unpacked.folders.get(name) for name, path in data.items()}
    arguments = [word for name, path in data.items() if path for word in (f"--{name}", str(path.resolve()))]
    arguments += ["--output", str(output), *["--tiny"] * options.tiny]
    command = [sys.executable, "-u", "-m", "benchmarks.gpu.steps", *arguments]
    outcomes = run(steps, command, output, started + options.seconds, unpacked)
    if any(outcome.status in ("failed", "timeout") for outcome in outcomes):
        sys.exit(1)


def run(
    steps: Sequence[Step], command: list[str], output: Path, deadline: float, unpacked: Unpacked | None = None
) -> list[Outcome]:
    """Runs `command STEP` for each step until `deadline` (of `time.monotonic`), and records every outcome at once."""
    outcomes, broken = [], ""
    for step in steps:
        left_s = deadline - time.monotonic()
        problems = [] if unpacked is None else [missing(tier, unpacked) for tier in step.tiers]
        if broken:
            outcome = Outcome(step.name, "skipped", f"{broken} failed")
        elif any(problems):
            outcome = Outcome(step.name, "skipped", "; ".join(filter(None, problems)))
        elif left_s < min(SHORTEST_S, step.limit_s):
            outcome = Outcome(step.name, "skipped", f"{max(left_s, 0):.0f} s were left")
        else:
            outcome = run_step(step, command, output, min(step.limit_s, left_s), environment(unpacked))
        outcomes.append(outcome)
        if step.required and outcome.status != "ok":
            broken = step.name
        with (output / "results.jsonl").open("a", encoding="utf-8") as file:
            line = {"step": step.name, "status": outcome.status, "reason": outcome.reason, "seconds": outcome.seconds}
            file.write(json.dumps(line) + "\n")
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"{step.name:12} {outcome.status:8} {outcome.seconds:5.1f} s{reason}", flush=True)
    return outcomes


def missing(tier: str, unpacked: Unpacked) -> str:
    """Returns why the kit lacks a tier; an empty string if it does not."""
    if tier in unpacked.folders:
        return ""
    return f"{tier}: {unpacked.problems.get(tier, 'the kit was packed without it')}"


def environment(unpacked: Unpacked | None) -> dict[str, str]:
    """Returns the environment of a step: the kit's packages first, then this project."""
    folders = [] if unpacked is None else [unpacked.folders[tier] for tier in PACKAGES if tier in unpacked.folders]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*folders, PROJECT]))}


def run_step(step: Step, command: list[str], output: Path, limit_s: float, environment: dict[str, str]) -> Outcome:
    """Runs one step; at its limit, kills it with all processes of its session."""
    started = time.monotonic()
    with (output / "log.txt").open("ab") as log:
        log.write(f"\n==== {step.name}\n".encode())
        log.flush()
        begin = log.tell()
        child = subprocess.Popen(
            [*command, step.name], stdout=log, stderr=log, start_new_session=True, env=environment, cwd=PROJECT
        )
        try:
            code = child.wait(limit_s)
            status, reason = ("ok", "") if code == 0 else ("failed", _describe(code))
        except subprocess.TimeoutExpired:
            status, reason = "timeout", f"killed after {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if status != "ok":
        lines = (output / "log.txt").read_bytes()[begin:].decode(errors="replace").strip().splitlines()
        reason += f"; last line: {lines[-1][:300]}" if lines else ""
    return Outcome(step.name, status, reason, round(time.monotonic() - started, 1))


def _describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
