"""What the driver of a submitted job finds around it; known without Ray."""

import os
from pathlib import Path

from pipeline.errors import UserError

SECRETS = "DENSENET_SECRETS"  # names of variables that a submitted job must find on the cluster


def check_secrets() -> None:
    """Raises `UserError` where a variable that the submitter named is not set here, in the job's driver."""
    names = [name for name in os.environ.get(SECRETS, "").split(",") if name]
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not set on the cluster. Set it for the nodes (in Kubernetes from a Secret); its "
            f"value is never sent from the submitting machine."
        )


def base_folder() -> Path:
    """Where a relative `run.output` lies: here, or in the home folder when here is a Ray job's throw-away copy."""
    here = Path.cwd()
    return Path.home() / "densenet" if "_ray_pkg_" in str(here) else here
