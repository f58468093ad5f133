"""The environment of a submitted job's driver. Needs no Ray."""

import os
from pathlib import Path

from pipeline.errors import UserError

SECRETS = "DENSENET_SECRETS"  # names of environment variables that must be set on the cluster


def check_secrets() -> None:
    """Raises `UserError` if an environment variable that `submit --secret` named is not set in the job's driver."""
    names = [name for name in os.environ.get(SECRETS, "").split(",") if name]
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not set on the cluster. Set it for the nodes (in Kubernetes from a Secret); its "
            f"value is never sent from the submitting machine."
        )


def base_folder() -> Path:
    """Returns the folder that a relative `run.output` is in: the current folder, or in a Ray job `~/densenet`.

    Ray deletes a job's working folder at its end.
    """
    current = Path.cwd()
    return Path.home() / "densenet" if "_ray_pkg_" in str(current) else current
