"""Provenance of a run: git commit and uncommitted changes, package versions, machine."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from pipeline.cuda import has_driver

_PACKAGES = ("torch", "timm", "deepspeed", "ray", "mlflow", "nvidia-dali-cuda130")
_PROJECT = Path(__file__).parents[2]
_LARGEST_DIFF = 1_000_000  # bytes
COMMIT, DIFF = "commit.json", "git.diff"  # stored with the code of a submitted job, which is not a git checkout


def write_commit(folder: Path) -> None:
    """Writes the git commit and the diff of uncommitted changes into a copy of the code; nothing outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return
    diff = _diff()
    (folder / COMMIT).write_text(json.dumps({"commit": commit.strip(), "dirty": bool(diff)}), encoding="utf-8")
    if diff:
        (folder / DIFF).write_bytes(diff)


def provenance_tags() -> dict[str, str]:
    """Returns tags with the versions of the main packages, the git commit and the machine."""
    tags = {f"version.{name}": importlib.metadata.version(name) for name in _PACKAGES}
    tags |= {
        "version.python": platform.python_version(),
        "machine.host": platform.node(),
        "machine.cpu": f"{os.cpu_count()} x {platform.machine()}",
        "machine.memory_gb": f"{psutil.virtual_memory().total / 1e9:.0f}",
        "machine.gpus": _gpus(),
    }
    commit_file = _PROJECT / COMMIT
    if commit_file.is_file():
        submitted = json.loads(commit_file.read_text(encoding="utf-8"))
        return tags | {"mlflow.source.git.commit": submitted["commit"], "git.dirty": str(submitted["dirty"]).lower()}
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return tags
    return tags | {"mlflow.source.git.commit": commit.strip(), "git.dirty": str(bool(_diff())).lower()}


def write_provenance(folder: Path) -> list[Path]:
    """Writes `packages.txt` (all installed packages) and, if there are uncommitted changes, `git.diff`."""
    installed = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    packages = folder / "packages.txt"
    packages.write_text("\n".join(sorted(installed, key=str.lower)) + "\n", encoding="utf-8")
    submitted = _PROJECT / DIFF
    diff = submitted.read_bytes() if submitted.is_file() else _diff()
    if not diff:
        return [packages]
    (folder / DIFF).write_bytes(diff)
    return [packages, folder / DIFF]


def _gpus() -> str:
    if not has_driver():
        return "none"
    import torch

    names: list[Any] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names))) or "none"


def _diff() -> bytes:
    """Returns the diff of tracked files against the commit, and the names of untracked files."""
    changed, new = _git("diff", "HEAD"), _git("ls-files", "--others", "--exclude-standard")
    text = (changed or "") + "".join(f"new file: {name}\n" for name in (new or "").splitlines())
    return text.encode()[:_LARGEST_DIFF]


def _git(*arguments: str) -> str | None:
    """Returns git's output in the project folder; None if the folder is not a checkout, or git is missing."""
    if not (_PROJECT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(_PROJECT), *arguments], capture_output=True, text=True, errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout
