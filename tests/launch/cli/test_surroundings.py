"""Commands in unusual environments: a batch system's TMPDIR, other packages of the same names, a closed pipe."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch.cli.common.tmpdir import MAX_BYTES, short_tmpdir
from pipeline.errors import UserError
from pipeline.train.setup import new_run_name
from tests.conftest import BIN, PROJECT


@pytest.fixture
def long_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch" / ("slurm_jobdir_" + "x" * 80)
    folder.mkdir(parents=True)
    return folder


def test_a_long_tmpdir_gets_a_short_link_in_the_context(monkeypatch, long_folder):
    monkeypatch.setenv("TMPDIR", str(long_folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with short_tmpdir():
        short = Path(tempfile.gettempdir())
        assert len(os.fsencode(short)) <= MAX_BYTES
        (short / "here").touch()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{short}/{'x' * 67}")
    assert {file.name for file in long_folder.iterdir()} == {"here", "x" * 67}
    assert os.environ["TMPDIR"] == str(long_folder)
    assert not short.parent.exists()


def test_a_missing_folder_is_created(monkeypatch, long_folder, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder / "new"))
    with short_tmpdir():
        (Path(os.environ["RAY_TMPDIR"]) / "ray").mkdir()
    assert (long_folder / "new" / "ray").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file" / long_folder.name))
    with pytest.raises(UserError, match="cannot be created: Not a directory"), short_tmpdir():
        pass


def test_a_short_tmpdir_is_unchanged(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp")
    with short_tmpdir():
        assert os.environ["TMPDIR"] == "/tmp"


def test_the_error_without_a_short_link_names_the_variable(monkeypatch, long_folder):
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder))
    monkeypatch.setattr("launch.cli.common.tmpdir._LINK_FOLDERS", (str(long_folder / "missing"),))
    with (
        pytest.raises(UserError, match=rf"^RAY_TMPDIR={long_folder} has \d+ bytes, .* shorter path\.$"),
        short_tmpdir(),
    ):
        pass


def test_runs_that_start_in_the_same_second_have_different_names():
    names = {new_run_name("demo") for _ in range(50)}
    assert len(names) == 50
    assert all(name.startswith("demo-2") for name in names)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_with_a_long_tmpdir_and_other_packages_and_variables(tmp_path, long_folder):
    """Imports and socket paths do not depend on the working folder or on other programs' variables."""
    for name in ("launch", "pipeline", "mlflow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('this is the code of another project')\n")

    def densenet(*arguments: object) -> str:
        command = [BIN / "densenet", *map(str, arguments)]
        others = {"DS_ACCELERATOR": "cuda", "RAY_TRAIN_V2_ENABLED": "0", "RANK": "3", "WORLD_SIZE": "8"}
        env = os.environ | others | {"TMPDIR": str(long_folder)}
        done = subprocess.run(
            command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    few = ("train.epochs=0.2", "schedule.warmup_epochs=0", "cluster.workers=1", "run.name=run")
    assert "checkpoint" in densenet("train", PROJECT / "configs" / "demo.yaml", *few)
    assert list((long_folder / "ray").glob("session_2*/logs")), "Ray's logs are in the user's temporary folder"
    assert "no errors" in densenet("data", "verify", tmp_path / "outputs" / "data" / "digits", "--workers", 2)


def test_a_terminal_without_utf_8_gets_escapes(tmp_path):
    """Class names may be in any script; a terminal in the C locale only shows ASCII."""
    folder = tmp_path / "\u00e9\u732b"
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([BIN / "densenet", "data", "verify", folder], env=env, stderr=subprocess.PIPE)
    assert (done.returncode, b"\\udcab is not a folder" in done.stderr) == (2, True), done.stderr


CLOSED_PIPE = """
import os, sys
from rich.console import Console
from launch.cli.common.output import ignore_closed_output
reading, writing = os.pipe()
os.dup2(writing, 1)
os.close(writing)
os.close(reading)
console = Console(file=sys.stdout)
ignore_closed_output(console)
for line in range(3):
    console.print("a line without a reader")
    sys.stderr.write(f"{line}\\n")
"""


def test_a_closed_pipe_does_not_end_a_command():
    done = subprocess.run([sys.executable, "-c", CLOSED_PIPE], cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "0\n1\n2\n")
