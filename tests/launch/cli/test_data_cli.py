"""`densenet data` on the command line."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from tests.data import synthetic

BIN = Path(sys.executable).parent


@pytest.mark.slow
def test_prepare_verify_and_stats_from_archives(shell, tmp_path):
    synthetic.write_ilsvrc(tmp_path / "source", synthetic.images())
    root = tmp_path / "set"
    done = shell("densenet", "data", "prepare", str(tmp_path / "source"), str(root))
    assert done.returncode == 0, done.stdout
    assert "train 32 images" in done.stdout
    assert "3 classes; 3 images re-encoded" in done.stdout
    assert "is already complete" in shell("densenet", "data", "prepare", str(tmp_path / "source"), str(root)).stdout
    report = tmp_path / "report.json"
    done = shell("densenet", "data", "verify", str(root), "--json", str(report))
    assert done.returncode == 0, done.stdout
    assert "no errors" in done.stdout
    assert json.loads(report.read_text())["splits"]["train"]["samples"] == 32
    done = shell("densenet", "data", "stats", str(root), "--plot", str(tmp_path / "plot.png"))
    assert done.returncode == 0, done.stdout
    assert "train: 32 images" in done.stdout and "8 to 16 per class" in done.stdout
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
    shard = root / "train" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[1500] ^= 0xFF
    shard.write_bytes(content)
    done = shell("densenet", "data", "verify", str(root), "--json", str(report))
    assert done.returncode == 1
    assert "checksum: 1" in done.stdout and "errors: " in done.stdout
    assert json.loads(report.read_text())["corrupt"] is True


@pytest.mark.slow
def test_class_folders_are_indexed_in_place(shell, tmp_path):
    synthetic.write_folders(tmp_path / "set", synthetic.images())
    (tmp_path / "set" / "test").mkdir()
    ignored = "ignored: 1 folders next to the data: test"
    assert ignored in shell("densenet", "data", "verify", str(tmp_path / "set")).stdout
    assert ignored in shell("densenet", "data", "prepare", str(tmp_path / "set"), str(tmp_path / "prepared")).stdout
    plot = str(tmp_path / "plot.png")
    assert ignored in shell("densenet", "data", "stats", str(tmp_path / "set"), "--plot", plot).stdout
    done = shell("densenet", "data", "index", str(tmp_path / "set"))
    assert done.returncode == 0, done.stdout
    assert ignored in done.stdout
    assert f"is ready for training: data.root={tmp_path / 'set'}" in done.stdout
    assert (tmp_path / "set" / "dataset.json").is_file()


@pytest.mark.slow
def test_parquet_files_are_indexed_where_they_are(shell, tmp_path):
    source, target = tmp_path / "source", tmp_path / "set"
    synthetic.write_parquet(source, synthetic.images())
    done = shell("densenet", "data", "index", str(source), "--to", str(target), "--workers", "2")
    assert done.returncode == 0, done.stdout
    assert "train 32 images" in done.stdout
    assert f"{target} is ready for training: data.root={target} data.stage=DIR" in done.stdout
    assert json.loads((target / "dataset.json").read_text())["address"] == str(source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prepare", "/gone", "/tmp/x"), "error: /gone is not a folder"),
        (("prepare", "/proc", "{tmp}/x", "--to", "zip"), "error: --to=zip is unknown: use shards or folders"),
        (("prepare", "{tmp}", "{tmp}/x", "--share", "8/8"), "error: --share=8/8 is invalid: use K/N with K from 0"),
        (("prepare", "{tmp}", "/proc/x", "--layout", "folders"), "error: /proc/x"),
        (("verify", "{tmp}"), "has no known layout; it contains: nothing"),
        (("stats", "{tmp}", "--layout", "nope"), "layout 'nope' is unknown"),
        (("index", "{tmp}"), "has no known layout"),
        (("index", "s3://bucket/set"), "error: s3://bucket/set is a URI: pass --to FOLDER, a new folder for the index"),
        (("index", "{tmp}", "--to", "{tmp}/x"), "has no .tar and no .parquet files, but contains: nothing"),
    ],
)
def test_bad_input_is_an_error_message(arguments, message, shell, tmp_path):
    done = shell("densenet", "data", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2, done.stdout
    assert message in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_ctrl_c_ends_a_preparation_and_its_processes_and_the_next_command_resumes(shell, tmp_path):
    tree = synthetic.images()
    for i in range(300):
        tree["train"]["n01440764"][f"more_{i}.JPEG"] = synthetic.encoded(synthetic.image(i % 7, (1200, 900)))
    synthetic.write_ilsvrc(tmp_path / "source", tree)
    command = ["data", "prepare", str(tmp_path / "source"), str(tmp_path / "set")]
    options = ["--shorter-side", "600", "--shard-size", "0.4", "--workers", "2"]
    with subprocess.Popen(
        [str(BIN / "densenet"), *command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # background jobs ignore SIGINT
    ) as process:
        while not list((tmp_path / "set").glob("train/*.tar")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()  # returns when the workers, which share the pipe, have ended
    assert process.returncode == 130, output
    lines = output.splitlines()  # on a busy machine, progress lines precede it
    assert lines[-1] == "interrupted: completed work is kept; repeat the command to resume"
    done = shell("densenet", *command, *options)
    assert done.returncode == 0, done.stdout
    assert "of them by an earlier command" in done.stdout
