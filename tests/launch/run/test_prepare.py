"""Paths and names that the driver sets before workers start."""

import re
from pathlib import Path

from launch.run.prepare import read_config

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"


def test_relative_paths_become_absolute_in_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = read_config(DEMO, ["data.root=images", "run.output=runs/mine"])
    assert config.data.root == str(tmp_path / "images")
    assert config.run.output == str(tmp_path / "runs" / "mine")
    assert re.fullmatch(r"demo-\d{8}-\d{6}-[0-9a-f]{6}", str(config.run.name))


def test_a_ray_job_writes_its_output_outside_its_working_folder(monkeypatch, tmp_path):
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert read_config(DEMO, []).run.output == str(tmp_path / "home" / "densenet" / "outputs")
    assert read_config(DEMO, ["run.output=/shared/runs"]).run.output == "/shared/runs"
