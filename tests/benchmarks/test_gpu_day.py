"""The runner of the GPU benchmarks with fake steps: limits, failures, missing tiers; and the steps' table."""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.common import RESULTS
from benchmarks.gpu.day import STEPS, Outcome, Step, run
from benchmarks.gpu.steps import FUNCTIONS
from benchmarks.gpu.unpack import Unpacked

FAKE = """
import os, signal, subprocess, sys
match sys.argv[-1]:
    case "works": print("fine")
    case "raises": raise ValueError("no such image")
    case "dies": os.kill(os.getpid(), signal.SIGKILL)
    case "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        print(child.pid, flush=True)
        signal.pause()
    case "imports": import training_package, ray_package
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return [sys.executable, str(script)]


def day(command: list[str], output: Path, *steps: Step, seconds: float = 60, **options) -> dict[str, Outcome]:
    outcomes = run(steps, command, output, time.monotonic() + seconds, **options)
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [(line["step"], line["status"], line["reason"]) for line in lines] == [
        (outcome.step, outcome.status, outcome.reason) for outcome in outcomes
    ]
    return {outcome.step: outcome for outcome in outcomes}


def test_a_step_that_fails_or_dies_does_not_end_the_day(command, tmp_path):
    found = day(command, tmp_path, Step("raises", 30), Step("dies", 30), Step("works", 30))
    assert found["raises"].status == "failed"
    assert found["raises"].reason == "exit code 1; last line: ValueError: no such image"
    assert (found["dies"].status, found["dies"].reason) == ("failed", "killed by SIGKILL")
    assert (found["works"].status, found["works"].reason) == ("ok", "")
    assert "fine" in (tmp_path / "log.txt").read_text()


def test_a_step_that_hangs_is_killed_with_its_children(command, tmp_path):
    found = day(command, tmp_path, Step("hangs", 2), Step("works", 30))
    assert found["hangs"].status == "timeout"
    assert found["hangs"].reason.startswith("killed after 2 s")
    assert found["works"].status == "ok"
    child = int(found["hangs"].reason.rpartition(" ")[2])
    for _ in range(100):  # its new parent may not have reaped it yet
        if not Path(f"/proc/{child}").exists() or "(zombie)" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        pytest.fail("the child of the killed step still runs")


def test_the_last_step_ends_with_the_day_and_later_ones_are_skipped(command, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.day.SHORTEST_S", 1)
    found = day(command, tmp_path, Step("hangs", 600), Step("works", 30), seconds=2)
    assert found["hangs"].status == "timeout"
    assert (found["works"].status, found["works"].reason) == ("skipped", "0 s were left")


def test_without_a_required_step_the_others_are_skipped(command, tmp_path):
    found = day(command, tmp_path, Step("raises", 30, required=True), Step("works", 30))
    assert (found["works"].status, found["works"].reason) == ("skipped", "raises failed")


def test_a_step_runs_with_the_tiers_that_it_needs(command, tmp_path):
    for tier in ("training", "ray"):
        (tmp_path / tier).mkdir()
        (tmp_path / tier / f"{tier}_package.py").touch()
    folders = {tier: tmp_path / tier for tier in ("training", "ray")}
    unpacked = Unpacked(folders, {"mlflow": "piece3 of kit is missing"})
    steps = (Step("imports", 30, ("training", "ray")), Step("works", 30, ("mlflow", "cifar")))
    found = day(command, tmp_path, *steps, unpacked=unpacked)
    assert found["imports"].status == "ok"
    assert found["works"].status == "skipped"
    assert found["works"].reason == "mlflow: piece3 of kit is missing; cifar: the kit was packed without it"


def test_every_step_has_a_function():
    assert [step.name for step in STEPS] == ["environment", *FUNCTIONS]
    for name in FUNCTIONS.values():
        module, _, function = name.partition(".")
        assert getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function).__doc__


def test_the_page_takes_the_rows_of_another_machine(tmp_path):
    mine, theirs = tmp_path / "mine.csv", tmp_path / "theirs.csv"
    lines = RESULTS.read_text().splitlines(keepends=True)
    mine.write_text("".join(lines[:3]))
    theirs.write_text(lines[0] + lines[-1])
    page.add(theirs, mine)
    assert mine.read_text() == "".join([*lines[:3], lines[-1]])
    theirs.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="the first line must have the columns of mine.csv"):
        page.add(theirs, mine)
