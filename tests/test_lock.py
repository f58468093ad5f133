"""The lock file: what `pyproject.toml` asks for, at exact versions, with hashes and without addresses."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1]
LOCK = (PROJECT / "requirements.lock").read_text()


def requirements() -> list[Requirement]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]


def test_every_requirement_is_locked_and_installed_at_a_version_that_it_allows():
    locked = {name: v for name, v in re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK, re.MULTILINE)}
    for requirement in requirements():
        name = requirement.name.lower().replace("_", "-")
        assert name in locked, f"{name}: run `make lock`"
        assert requirement.specifier.contains(locked[name]), (
            f"{requirement} is locked at {locked[name]}: run `make lock`"
        )
        assert requirement.specifier.contains(version(name)), f"{requirement} is installed at {version(name)}"


def test_every_package_has_hashes_and_none_has_an_address():
    packages = re.split(r"\n(?=[a-z0-9])", LOCK.strip())
    assert len(packages) > 100
    for package in packages:
        assert "--hash=sha256:" in package, package.splitlines()[0]
    assert "://" not in LOCK
