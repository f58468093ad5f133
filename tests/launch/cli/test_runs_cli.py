"""`densenet runs`: lists, shows and compares runs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import start_run


@pytest.fixture
def runs(tmp_path: Path, densenet) -> Callable[..., tuple[int, str]]:
    """Two runs, the second with a restart; `runs(*arguments)` returns the exit code and the output."""
    for name, lr, top1 in (("one", 0.1, 90.0), ("two", 0.2, 95.5)):
        with start_run(tmp_path, name) as tracker:
            tracker.log_params({"optim": {"lr": lr, "momentum": 0.9}, "model.name": "densenet121"})
            tracker.set_tags({"eval.transform": "resize 256", "version.torch": "2.14"})
            tracker.log_metrics({"val/top1": top1, "train/epoch": 3.0}, 64)
            if name == "two":
                tracker.set_tags({"restart.1": "worker 0: its process or node died"})
                tracker.log_metrics({"restarts": 1, "lost_samples": 32}, 64)
    return lambda *arguments: densenet("runs", *arguments, "--uri", tracker.uri)


def test_runs_are_listed_shown_and_compared(runs):
    code, listed = runs("list")
    assert code == 0, listed
    assert re.search(r"^two +FINISHED .* densenet121 +3 +95\.5 +[0-9a-f]{32}$", listed, re.MULTILINE)
    assert listed.index("two") < listed.index("one"), "newest first"
    assert "one" not in runs("list", "--limit", "1")[1]

    code, shown = runs("show", "two")
    assert code == 0, shown
    assert re.search(r"^val/top1 +95\.5$", shown, re.MULTILINE)
    assert re.search(r"^restart\.1 +worker 0: its process or node died$", shown, re.MULTILINE)
    assert re.search(r"^lost_samples +32$", shown, re.MULTILINE)
    assert re.search(r"^version\.torch +\d", shown, re.MULTILINE)
    run_id = re.search(r"^id +([0-9a-f]{32})$", shown, re.MULTILINE)[1]
    assert runs("show", run_id)[1] == shown

    code, compared = runs("compare", "one", "two")
    assert code == 0, compared
    assert re.search(r"^val/top1 +90 +95\.5 *$", compared, re.MULTILINE)
    assert re.search(r"^optim\.lr +0\.1 +0\.2 *$", compared, re.MULTILINE)
    assert "optim.momentum" not in compared


def test_runs_as_json_are_complete(runs):
    listed = json.loads(runs("list", "--json")[1])
    assert [(run["name"], run["metrics"]["val/top1"], run["params"]["optim.lr"]) for run in listed] == [
        ("two", 95.5, "0.2"),
        ("one", 90.0, "0.1"),
    ]
    assert json.loads(runs("show", "two", "--json")[1]) == listed[0]


def test_missing_runs_and_experiments_are_named(runs):
    code, printed = runs("show", "three")
    assert code == 2
    assert "there is no run 'three'" in printed
    assert "newest runs: two, one" in printed
    code, printed = runs("list", "--experiment", "densnet")
    assert code == 2
    assert "there is no experiment 'densnet'" in printed
    assert "densenet" in printed.split("existing experiments:")[1]
