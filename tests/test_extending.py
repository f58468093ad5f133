"""`docs/extending.md`: its code blocks, as a plugin outside the package, register one of each."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cluster.submit import package
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.extension_points import AUGMENTATIONS, DATA_SOURCES, OPTIMIZERS, SCHEDULES, TRACKERS
from pipeline.locations import locations
from tests.conftest import PROJECT

NAME, MODEL = "docs_plugin", "docs_model"
CHOICES = {
    "model.name": "plain",
    "optim.name": "signum",
    "schedule.name": "square-root",
    "augment.custom": "[rotate]",
    "tracking.custom": "[lines]",
    "data.root": "noise://40",
}
OPTIONS = [f"{key}={value}" for key, value in CHOICES.items()]
OPTIONS += ["optim.lr=0.001", "schedule.warmup_epochs=0", "train.global_batch_size=16", "cluster.workers=1"]


@pytest.fixture(autouse=True)
def unregister_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plugins stay registered in a process; this removes them after each test."""
    for table in (OPTIMIZERS, SCHEDULES, AUGMENTATIONS, DATA_SOURCES, TRACKERS):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
    yield
    for name in (NAME, MODEL):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code blocks as one file, and the last one, a model that needs no other module of this project, as another."""
    file = tmp_path_factory.mktemp("plugin") / f"{NAME}.py"
    *blocks, model = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "extending.md").read_text(), re.DOTALL)
    file.write_text("\n\n".join(blocks))
    (file.parent / f"{MODEL}.py").write_text(model)
    return file


def plugins(plugin: Path) -> str:
    return f"run.plugins=[{plugin},{plugin.with_name(f'{MODEL}.py')}]"


def test_without_the_plugin_its_names_are_errors(shell):
    """Runs in another process, since plugins stay registered in this one."""
    for option in OPTIONS[:6]:
        done = shell("densenet", "plan", "demo", option)
        assert done.returncode == 2, option
        assert option.partition("=")[0].split(".")[1] in done.stdout, done.stdout


def test_plan_accepts_plugin_names_and_warns_about_unused_keys(plugin, densenet):
    code, output = densenet("plan", "demo", plugins(plugin), *OPTIONS, "optim.eps=1e-4", "schedule.min_lr_ratio=0.1")
    assert code == 0, output
    assert "0.001, signum, schedule square-root" in output
    assert "optim.eps=0.0001 has no effect: it applies to adamw, lamb and muon, optim.name is signum" in output
    assert "schedule.min_lr_ratio" not in output.partition("warning")[2]
    code, output = densenet("plan", "demo", f"run.plugins=[{plugin}]", "optim.name=signumm")
    assert (code, "did you mean 'signum'?" in output) == (2, True), output


def test_a_plugin_that_cannot_be_imported_is_an_error(tmp_path):
    (tmp_path / "wrong_plugin.py").write_text("1 / 0\n")
    (tmp_path / "pytest.py").touch()
    for name, reason in (
        (tmp_path / "wrong_plugin.py", "ZeroDivisionError: division by zero"),
        (tmp_path / "gone_plugin.py", "the file does not exist"),
        (tmp_path / "pytest.py", "another module is called pytest: rename the file"),
        ("gone_module", "No module named 'gone_module'"),
    ):
        with pytest.raises(ConfigError, match=rf"run.plugins: plugin {name} cannot be imported: .*{reason}"):
            load_config("demo", f"run.plugins=[{name}]")


def test_a_submitted_job_contains_the_plugin_as_a_module(plugin, tmp_path):
    config = load_config("demo", f"run.plugins=[{plugin}]", "optim.name=signum")
    assert ("run.plugins", str(plugin)) in [(key, location) for key, _, location in locations(config)]
    package(tmp_path, config)
    assert (tmp_path / plugin.name).read_text() == plugin.read_text()
    assert load_config(tmp_path / "job.yaml").run.plugins == (NAME,)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_plugin_trains_and_its_model_loads_without_it(plugin, shell, tmp_path):
    overrides = [plugins(plugin), f"run.output={tmp_path}", *OPTIONS, "run.name=run", "train.log_every_steps=1"]
    done = shell("densenet", "train", "demo", *overrides, "train.epochs=1")
    assert done.returncode == 0, done.stdout
    assert "model        plain version 1, alias candidate" in done.stdout

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines if "train/loss" in line] == [16, 32, 48]
    journal = tmp_path / "run" / "tracking.jsonl"
    assert json.loads((tmp_path / "run" / "tracker-lines.json").read_text())["sent"] == journal.stat().st_size

    # The registered model includes its code: this process has neither the plugin nor this project.
    (tmp_path / "empty").mkdir()
    image = next(tmp_path.glob("data/noise-*/val/class1/*.png"))
    shutil.copy(image, tmp_path / "empty" / "image.png")
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import mlflow, pandas, pathlib\n"
        f"mlflow.set_tracking_uri('sqlite:///{tmp_path}/mlflow.db')\n"
        "model = mlflow.pyfunc.load_model('models:/plain@candidate')\n"
        "print(model.unwrap_python_model().predict(None, pandas.DataFrame({'image': [pathlib.Path('image.png')]})))\n"
    )
    outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "empty", env=outer, capture_output=True, text=True
    )
    assert "class_name" in loaded.stdout, loaded.stderr
