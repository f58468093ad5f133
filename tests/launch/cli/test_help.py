"""The command line's help, examples, tracebacks, import time and JSON output."""

import json
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import typer

from launch import cli
from launch.cli import GROUPS, app, names
from launch.kubernetes.manifests import overlays
from tests.conftest import PROJECT

DEMO = PROJECT / "configs" / "demo.yaml"
ROOT = typer.main.get_command(app)


def commands(group: typer.core.TyperGroup = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Returns the paths of all commands."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


def test_every_command_is_in_a_group_and_the_help_fits_a_screen(densenet):
    assert sorted(name for group in GROUPS for name in names(group)) == sorted(ROOT.commands)
    code, printed = densenet("--help")
    assert code == 0
    assert len(printed.splitlines()) <= 40
    assert "..." not in printed.partition("Data and plan")[2], "a line is truncated"
    assert "Exit codes: 0 done, 1 training failed, 2 bad input" in printed


def test_every_module_of_the_command_line_has_an_app_and_is_in_a_group():
    modules = {module.name for module in pkgutil.iter_modules(cli.__path__)} - {"__main__", "common"}
    assert modules == {module.__name__.rpartition(".")[2] for group in GROUPS.values() for module in group}


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_has_an_example_that_parses(path):
    group = ROOT
    for name in path:
        command = group.commands[name]
        group = command
    (example,) = re.findall(r"Example: (densenet .*)$", command.help or "", re.MULTILINE)
    words = shlex.split(example)[1:]
    assert tuple(words[: len(path)]) == path
    command.make_context(path[-1], words[len(path) :])


def test_the_overlay_option_lists_all_overlays():
    (option,) = [p for p in ROOT.commands["k8s"].commands["render"].params if p.name == "overlay"]
    assert sorted(re.findall(r"[a-z0-9-]{4,}", option.help.replace(" or ", " "))) == overlays()


def test_verbose_prints_the_traceback_of_an_error(shell):
    for options in ([], ["--verbose"]):
        done = shell("densenet", *options, "plan", "missing.yaml")
        assert done.returncode == 2
        assert "error: " in done.stdout
        assert ("in load_config" in done.stdout) == bool(options)


def test_ctrl_c_ends_a_command_without_a_traceback(densenet, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.run.plan.plan", interrupted)
    assert densenet("plan", DEMO) == (130, "")


_SLOW = {"torch", "timm", "nvidia.dali", "ray", "mlflow", "deepspeed"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, plan imports torch to count the CUDA devices")
def test_a_plan_imports_no_slow_packages(tmp_path):
    assert not _SLOW & _imported_by("plan", str(DEMO), f"run.output={tmp_path}")


def test_a_list_of_models_imports_no_slow_packages_but_mlflow(tmp_path):
    imported = _imported_by("models", "list", "--uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert _SLOW & imported == {"mlflow"}


@pytest.mark.parametrize("arguments", [[], *([name] for name in (*names("Train"), *names("Data and plan")))])
def test_help_does_not_import_the_config(arguments):
    assert not (_SLOW | {"pipeline.config", "omegaconf", "fsspec", "numpy"}) & _imported_by(*arguments, "--help")


def _imported_by(*arguments: str) -> set[str]:
    """Returns the modules that a new process has imported after a command."""
    program = "import sys; from launch.cli import app\n"
    program += "app(sys.argv[1:], standalone_mode=False); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_a_plan_as_json_is_complete(densenet, tmp_path):
    code, printed = densenet("plan", DEMO, f"run.output={tmp_path}", "run.name=x", "--json")
    assert code == 0
    plan = json.loads(printed)
    assert plan["config"]["run"]["name"] == "x"
    d = plan["derived"]
    assert (
        d["device_batch_size"] * d["gradient_accumulation_steps"] * d["workers"]
        == plan["config"]["train"]["global_batch_size"]
    )
    assert plan["start"] == "random, from seed 0"
    code, printed = densenet("plan", DEMO, "--cluster", "1x1xH100", "--json")
    assert (code, "omit one" in printed) == (2, True)
