"""The wheel, installed without the checkout and run in an empty folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.kubernetes.manifests import K8S
from tests.conftest import BIN, PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.long]
# Sources of the wheel, copied so that the build neither uses nor writes files in the checkout.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "requirements.lock", "configs", "k8s", "launch", "pipeline")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this project's wheel, installed by pip."""
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
def run_installed(installed: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_installed("densenet", ...)` runs a program of the wheel in an empty folder."""
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


def test_the_demo_and_a_prediction(run_installed, installed):
    where = run_installed("python", "-c", "import launch, pipeline; print(launch.__file__, pipeline.__file__)")
    assert where.stdout.count(str(installed)) == 2, where.stdout
    done = run_installed("densenet", "train", "demo", "train.epochs=0.5", "schedule.warmup_epochs=0", "run.name=run")
    assert done.returncode == 0, done.stdout
    assert "model        densenet_tiny version 1, alias candidate" in done.stdout
    predicted = run_installed(
        "densenet", "predict", "models:/densenet_tiny@candidate", "outputs/data/digits/val/3/0045.jpg", "--json"
    )
    assert predicted.returncode == 0, predicted.stdout


def test_the_wheel_includes_configs_and_manifests(installed, run_installed, tmp_path):
    listed = run_installed("densenet", "configs", "list")
    assert {"demo", "densenet121", "recipes/paper"} <= {line.split()[0] for line in listed.stdout.splitlines()}
    assert (
        run_installed("densenet", "configs", "show", "densenet121").stdout
        == (PROJECT / "configs" / "densenet121.yaml").read_text()
    )
    copied = run_installed("densenet", "configs", "copy", "densenet121", "mine")
    assert copied.stdout.splitlines() == ["mine/densenet121.yaml", "mine/recipes/paper.yaml"]
    again = run_installed("densenet", "configs", "copy", "densenet121", "mine")
    assert (again.returncode, "mine/densenet121.yaml, mine/recipes/paper.yaml exists" in again.stdout) == (2, True)
    own = run_installed("densenet", "plan", "mine/densenet121.yaml", "--cluster", "1x8xH100")
    assert own.stdout == run_installed("densenet", "plan", "densenet121", "--cluster", "1x8xH100").stdout
    wrong = run_installed("densenet", "plan", "densenet12")
    assert wrong.returncode == 2
    assert "config 'densenet12' is neither a file nor built in. Did you mean 'densenet121'? Built in: " in wrong.stdout

    options = ["--overlay", "local-cpu", "--image", "registry.example/densenet:1.0"]
    rendered = run_installed(
        "densenet", "k8s", "render", "demo", "run.name=first", "run.output=/runs", *options, "--set", "nodes=1"
    )
    assert rendered.returncode == 0, rendered.stdout
    assert "kind: RayJob" in rendered.stdout
    manifests = installed / "launch" / "kubernetes" / "k8s" / "monitoring"
    assert sorted(file.name for file in manifests.iterdir()) == sorted(p.name for p in (K8S / "monitoring").iterdir())


def test_a_missing_package_is_reported_with_its_extra(run_installed, tmp_path):
    """A command whose packages are not installed names the extra that has them."""
    for package in ("onnx", "kubernetes_validate"):
        (tmp_path / "hidden" / package).mkdir(parents=True)
        missing = f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n"
        (tmp_path / "hidden" / package / "__init__.py").write_text(missing)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'hidden')!r}); from launch.cli import main; main()"
    export = run_installed("python", "-c", code, "export", "models:/x@y", "--to", "onnx", "--out", "here")
    assert (export.returncode, export.stdout) == (
        2,
        "error: this needs the package onnx, which is not installed: pip install 'densenet-pipeline[export]'.\n",
    )
    validate = run_installed("python", "-c", code, "k8s", "validate", "first.yaml")
    assert "pip install 'densenet-pipeline[kubernetes]'" in validate.stdout


def test_a_job_includes_the_code_and_the_locked_packages(run_installed):
    """`submit` needs no checkout: it fails only at the unreachable cluster."""
    done = run_installed("densenet", "submit", "demo", "run.output=/runs", "--address", "http://127.0.0.1:1")
    assert (done.returncode, "no Ray dashboard is reachable at http://127.0.0.1:1" in done.stdout) == (2, True), (
        done.stdout
    )
    code = "from launch.cluster.submit import locked_requirements; print(*locked_requirements())"
    assert "torch==2.14.1" in run_installed("python", "-c", code).stdout
