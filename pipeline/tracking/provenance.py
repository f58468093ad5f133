"""What a run was made by: the code's commit and its changes, package versions, the machine."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("torch", "timm", "deepspeed", "ray", "mlflow", "nvidia-dali-cuda130")
_PROJECT = Path(__file__).parents[2]
_LARGEST_DIFF = 1_000_000  # bytes
COMMIT, DIFF = "commit.json", "git.diff"  # beside the code of a submitted job, which is no git checkout


def write_commit(folder: Path) -> None:
    """Writes this code's commit, and what was changed since, into a copy of it; nothing where git knows neither."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return
    diff = _diff()
    (folder / COMMIT).write_text(json.dumps({"commit": commit.strip(), "dirty": bool(diff)}), encoding="utf-8")
    if diff:
        (folder / DIFF).write_bytes(diff)


def provenance_tags() -> dict[str, str]:
    """Tags: versions of the main packages, commit, machine."""
    tags = {f"version.{name}": importlib.metadata.version(name) for name in _PACKAGES}
    tags |= {
        "version.python": platform.python_version(),
        "machine.host": platform.node(),
        "machine.cpu": f"{os.cpu_count()} x {platform.machine()}",
        "machine.memory_gb": f"{psutil.virtual_memory().total / 1e9:.0f}",
        "machine.gpus": _gpus(),
    }
    known = _PROJECT / COMMIT
    if known.is_file():
        written = json.loads(known.read_text(encoding="utf-8"))
        return tags | {"mlflow.source.git.commit": written["commit"], "git.dirty": str(written["dirty"]).lower()}
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return tags
    return tags | {"mlflow.source.git.commit": commit.strip(), "git.dirty": str(bool(_diff())).lower()}


def write_provenance(folder: Path) -> list[Path]:
    """Writes `packages.txt`, all that is installed, and, where the code differs from its commit, `git.diff`."""
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
    import torch

    names: list[Any] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names))) or "none"


def _diff() -> bytes:
    """Changes of tracked files since the commit, and the names of new ones."""
    changed, new = _git("diff", "HEAD"), _git("ls-files", "--others", "--exclude-standard")
    text = (changed or "") + "".join(f"new file: {name}\n" for name in (new or "").splitlines())
    return text.encode()[:_LARGEST_DIFF]


def _git(*arguments: str) -> str | None:
    """What git prints in the project's folder; None where that is no checkout of its own, or there is no git."""
    if not (_PROJECT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(_PROJECT), *arguments], capture_output=True, text=True, errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout
