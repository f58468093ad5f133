"""The wheel by itself: installed apart from the checkout, in an empty folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import BIN, PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.long]
# What a wheel is made of; nothing that a build leaves behind is used or made in the checkout.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "requirements.lock", "configs", "k8s", "launch", "pipeline")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this project's wheel, unpacked by pip."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (PROJECT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PROJECT / name, folder / "source" / name, symlinks=True, ignore=ignore)
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copyfile(PROJECT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture
def apart(installed: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`apart("densenet", ...)` runs a program of the wheel in an empty folder."""
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(program: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        path = f"{installed / 'bin'}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"
        outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [shutil.which(program, path=path) or program, *arguments],
            cwd=empty,
            env=outer | {"PYTHONPATH": str(installed), "PATH": path} | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


def test_the_demo_and_what_follows_from_it(apart, installed):
    where = apart("python", "-c", "import launch, pipeline; print(launch.__file__, pipeline.__file__)")
    assert where.stdout.count(str(installed)) == 2, where.stdout
    done = apart("densenet", "train", "demo", "train.epochs=0.5", "schedule.warmup_epochs=0", "run.name=run")
    assert done.returncode == 0, done.stdout
    assert "model        densenet_tiny version 1, alias candidate" in done.stdout
    predicted = apart(
        "densenet", "predict", "models:/densenet_tiny@candidate", "outputs/data/digits/val/3/0045.jpg", "--json"
    )
    assert predicted.returncode == 0, predicted.stdout


def test_configs_and_manifests_come_with_it(apart, tmp_path):
    listed = apart("densenet", "configs", "list")
    assert {"demo", "densenet121", "recipes/paper"} <= {line.split()[0] for line in listed.stdout.splitlines()}
    assert (
        apart("densenet", "configs", "show", "densenet121").stdout
        == (PROJECT / "configs" / "densenet121.yaml").read_text()
    )
    copied = apart("densenet", "configs", "copy", "densenet121", "mine")
    assert copied.stdout.splitlines() == ["mine/densenet121.yaml", "mine/recipes/paper.yaml"]
    again = apart("densenet", "configs", "copy", "densenet121", "mine")
    assert (again.returncode, "mine/densenet121.yaml, mine/recipes/paper.yaml exists" in again.stdout) == (2, True)
    own = apart("densenet", "plan", "mine/densenet121.yaml", "--cluster", "1x8xH100")
    assert own.stdout == apart("densenet", "plan", "densenet121", "--cluster", "1x8xH100").stdout
    wrong = apart("densenet", "plan", "densenet12")
    assert wrong.returncode == 2
    assert "config 'densenet12' is neither a file nor built in. Did you mean 'densenet121'? Built in: " in wrong.stdout

    options = ["--overlay", "local-cpu", "--image", "registry.example/densenet:1.0"]
    rendered = apart(
        "densenet", "k8s", "render", "demo", "run.name=first", "run.output=/runs", *options, "--set", "nodes=1"
    )
    assert rendered.returncode == 0, rendered.stdout
    assert "kind: RayJob" in rendered.stdout


def test_what_an_extra_would_bring_is_named(apart, tmp_path):
    """A command whose packages are not there says which extra has them."""
    for package in ("onnx", "kubernetes_validate"):
        (tmp_path / "hidden" / package).mkdir(parents=True)
        missing = f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n"
        (tmp_path / "hidden" / package / "__init__.py").write_text(missing)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'hidden')!r}); from launch.cli import main; main()"
    export = apart("python", "-c", code, "export", "models:/x@y", "--to", "onnx", "--out", "here")
    assert (export.returncode, export.stdout) == (
        2,
        "error: this needs the package onnx, which is not installed: pip install 'densenet-pipeline[export]'.\n",
    )
    validate = apart("python", "-c", code, "k8s", "validate", "first.yaml")
    assert "pip install 'densenet-pipeline[kubernetes]'" in validate.stdout


def test_a_job_carries_the_code_and_the_locked_packages(apart):
    """Whatever `submit` sends is there without the checkout; it gets as far as the cluster that is not."""
    done = apart("densenet", "submit", "demo", "run.output=/runs", "--address", "http://127.0.0.1:1")
    assert (done.returncode, "no Ray dashboard answers at http://127.0.0.1:1" in done.stdout) == (2, True), done.stdout
    code = "from launch.cluster.submit import folder_lock; print(*locked_requirements())"
    assert "torch==2.14.1" in apart("python", "-c", code).stdout
