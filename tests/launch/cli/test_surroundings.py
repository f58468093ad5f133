"""Commands in foreign surroundings: a batch system's TMPDIR, other code of the same names, readers that go."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch.cli.common.tmpdir import LONGEST, short_tmpdir
from pipeline.errors import UserError
from pipeline.train.setup import new_name
from tests.conftest import BIN, PROJECT


@pytest.fixture
def long_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch" / ("slurm_jobdir_" + "x" * 80)
    folder.mkdir(parents=True)
    return folder


def test_a_long_tmpdir_gets_a_short_name_for_as_long_as_it_is_needed(monkeypatch, long_folder):
    monkeypatch.setenv("TMPDIR", str(long_folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with short_tmpdir():
        short = Path(tempfile.gettempdir())
        assert len(os.fsencode(short)) <= LONGEST
        (short / "here").touch()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{short}/{'x' * 67}")
    assert {file.name for file in long_folder.iterdir()} == {"here", "x" * 67}
    assert os.environ["TMPDIR"] == str(long_folder)
    assert not short.parent.exists()


def test_a_folder_that_is_missing_is_made_as_ray_would(monkeypatch, long_folder, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder / "new"))
    with short_tmpdir():
        (Path(os.environ["RAY_TMPDIR"]) / "ray").mkdir()
    assert (long_folder / "new" / "ray").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file" / long_folder.name))
    with pytest.raises(UserError, match="cannot be made: Not a directory"), short_tmpdir():
        pass


def test_a_short_tmpdir_is_left_alone(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp")
    with short_tmpdir():
        assert os.environ["TMPDIR"] == "/tmp"


def test_where_no_short_name_can_be_made_the_variable_is_named(monkeypatch, long_folder):
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder))
    monkeypatch.setattr("launch.cli.common.tmpdir._SHORT", (str(long_folder / "missing"),))
    with (
        pytest.raises(UserError, match=rf"^RAY_TMPDIR={long_folder} has \d+ bytes, .* shorter path\.$"),
        short_tmpdir(),
    ):
        pass


def test_starts_in_the_same_second_have_names_of_their_own():
    names = {new_name("demo") for _ in range(50)}
    assert len(names) == 50
    assert all(name.startswith("demo-2") for name in names)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_below_a_long_tmpdir_beside_other_code_and_with_other_programs_variables(tmp_path, long_folder):
    """What is imported, and where sockets are, do not follow from where a command is run."""
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
    assert list((long_folder / "ray").glob("session_2*/logs")), "Ray's logs are where the user wants temporary files"
    assert "no corruption" in densenet("data", "verify", tmp_path / "outputs" / "data" / "digits", "--workers", 2)


def test_a_terminal_without_utf_8_gets_escapes(tmp_path):
    """Names of classes may be in any script; the C locale's terminals know ASCII alone."""
    folder = tmp_path / "\u00e9\u732b"
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([BIN / "densenet", "data", "verify", folder], env=env, stderr=subprocess.PIPE)
    assert (done.returncode, b"\\udcab is not a folder" in done.stderr) == (2, True), done.stderr


LEFT = """
import os, sys
from rich.console import Console
from launch.cli.common.output import outlive_readers
reading, writing = os.pipe()
os.dup2(writing, 1)
os.close(writing)
os.close(reading)
console = Console(file=sys.stdout)
outlive_readers(console)
for line in range(3):
    console.print("a line that nobody reads")
    sys.stderr.write(f"{line}\\n")
"""


def test_output_that_nobody_reads_any_longer_ends_nothing():
    done = subprocess.run([sys.executable, "-c", LEFT], cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "0\n1\n2\n")
