"""The lock files: the requirements of `pyproject.toml` at exact versions, with hashes and without URLs."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1]
LOCK = (PROJECT / "requirements.lock").read_text()
DEV_LOCK = (PROJECT / "requirements-dev.lock").read_text()


def versions(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))


def extras(project: dict) -> list[str]:
    """Returns the requirements of all extras; `all` names the other extras."""
    found = project["project"]["optional-dependencies"]
    assert found.pop("all") == [f"densenet-pipeline[{','.join(sorted(found))}]"]
    return [requirement for requirements in found.values() for requirement in requirements]


@pytest.mark.parametrize(("lock", "group"), [(LOCK, "runtime"), (DEV_LOCK, "dev")])
def test_every_requirement_is_locked_and_installed_at_an_allowed_version(lock, group):
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    requirements = project["dependency-groups"].get(group) or project["project"]["dependencies"] + extras(project)
    locked = versions(lock)
    for requirement in map(Requirement, requirements):
        name = requirement.name.lower().replace("_", "-")
        assert name in locked, f"{name}: run `make lock`"
        assert requirement.specifier.contains(locked[name]), (
            f"{requirement} is locked at {locked[name]}: run `make lock`"
        )
        assert requirement.specifier.contains(version(name)), f"{requirement} is installed at {version(name)}"


def test_shared_packages_have_one_version_and_dev_tools_are_not_in_the_runtime_lock():
    runtime, dev = versions(LOCK), versions(DEV_LOCK)
    assert {name: runtime[name] for name in runtime.keys() & dev} == {name: dev[name] for name in runtime.keys() & dev}
    assert not {"pytest", "ruff", "mypy", "moto", "uv"} & runtime.keys()


@pytest.mark.parametrize("lock", [LOCK, DEV_LOCK], ids=["runtime", "dev"])
def test_every_package_has_hashes_and_no_url(lock):
    packages = re.split(r"\n(?=[a-z0-9])", lock.strip())
    assert len(packages) > 50
    for package in packages:
        assert "--hash=sha256:" in package, package.splitlines()[0]
    assert "://" not in lock
