"""`ray job submit` to a cluster on loopback: the exit code, and what is uploaded."""

from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.launch.conftest import Head

pytestmark = pytest.mark.slow


def uploaded_files(head: Head) -> set[str]:
    """Names of all files in the working folders that the cluster's jobs got."""
    packages = (head.folder / "session_latest" / "runtime_resources" / "working_dir_files").glob("_ray_pkg_*/")
    return {file.relative_to(package).as_posix() for package in packages for file in package.rglob("*")}


@pytest.fixture
def ignored_file() -> Path:
    """A file in a folder that `.gitignore` names."""
    file = PROJECT / "outputs" / "not-for-upload.bin"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"data")
    yield file
    file.unlink()


def test_the_demo_as_a_job_and_a_job_that_fails(ray_head, shell, tmp_path, ignored_file):
    submit = ["job", "submit", "--address", ray_head.dashboard, "--working-dir", ".", "--"]
    train = ["densenet", "train", "configs/demo.yaml"]
    done = shell("ray", *submit, *train, "train.epochs=2", f"run.output={tmp_path}", env=ray_head.env)
    assert done.returncode == 0, done.stdout
    assert "top-1" in done.stdout
    assert "succeeded" in done.stdout
    assert list(tmp_path.glob("demo-*/checkpoints/samples-*/manifest.json"))
    names = uploaded_files(ray_head)
    assert {"launch/cli.py", "pipeline/config.py", "configs/demo.yaml"} <= names
    assert not [name for name in names if name.startswith((".git/", ".venv/", "outputs/"))]

    failed = shell("ray", *submit, *train, "cluster.workers=4", f"run.output={tmp_path}", env=ray_head.env)
    assert failed.returncode != 0
    assert "has 2: set fewer cluster.workers" in failed.stdout


def test_a_driver_beside_the_cluster_joins_it_and_asks_what_it_has(ray_head, shell, tmp_path):
    arguments = ["configs/demo.yaml", f"run.output={tmp_path}", "--address", ray_head.address]
    asked = shell("densenet", "plan", *arguments, "cluster.workers=4", env=ray_head.env)
    assert asked.returncode == 2
    assert f"the cluster at {ray_head.address} has 2: set fewer cluster.workers" in asked.stdout
    fitting = shell("densenet", "plan", *arguments, env=ray_head.env)
    assert fitting.returncode == 0, fitting.stdout
    assert "workers      2 on cpu, 1 CPU cores each" in fitting.stdout
