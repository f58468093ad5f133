"""The two MLflow URIs of a run or command, determined once: tracking store and model registry."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import RunConfig

TRACKING_VARIABLE, REGISTRY_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Stores:
    """MLflow's tracking and registry URIs. They may contain passwords from the environment: print `redacted(uri)`."""

    tracking: str
    registry: str

    @property
    def separate_registry(self) -> bool:
        """Whether the model registry is another store than the tracking store."""
        return self.tracking != self.registry

    def options(self) -> str:
        """Returns the command line options for these stores, each with a leading space; empty if they are the defaults.

        Includes a separate registry even if MLFLOW_REGISTRY_URI names it, since that variable may be set for one
        command only; unless the URI has a password.
        """
        options, default = "", stores_from_options(None, None)
        if self.tracking != default.tracking:
            options += f" --uri {shlex.quote(redacted(self.tracking))}"
            default = stores_from_options(self.tracking, None)
        explicit = self.separate_registry and redacted(self.registry) == self.registry
        if self.registry != default.registry or explicit:
            options += f" --registry-uri {shlex.quote(redacted(self.registry))}"
        return options


def stores_from_config(config: "RunConfig") -> Stores:
    """Returns the stores of a run.

    The tracking store is `tracking.uri`, else MLFLOW_TRACKING_URI, else a SQLite file in `run.output`. The registry is
    `tracking.registry_uri`, else MLFLOW_REGISTRY_URI, else the tracking store.

    Raises:
        UserError: The path of `run.output` cannot be part of a SQLite URI.
    """
    return _stores(config.tracking.uri, config.tracking.registry_uri, Path(config.run.output))


def stores_from_options(uri: str | None, registry_uri: str | None, output: Path = Path("outputs")) -> Stores:
    """Returns the stores of a command's options, with the same defaults as `stores_from_config`."""
    return _stores(uri, registry_uri, output)


def redacted(uri: str) -> str:
    """Returns the URI with its password replaced by `***`, for messages."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", uri)


def sqlite_file(uri: str) -> Path | None:
    """Returns the file of a SQLite URI; None for other URIs."""
    path = uri.removeprefix(_SQLITE)
    return None if path == uri else Path(path)


def _stores(uri: str | None, registry_uri: str | None, output: Path) -> Stores:
    tracking = uri or os.environ.get(TRACKING_VARIABLE) or _default(output)
    registry = registry_uri or os.environ.get(REGISTRY_VARIABLE) or tracking
    return Stores(_absolute(tracking), _absolute(registry))


def _default(output: Path) -> str:
    if "?" in str(output.absolute()):
        raise UserError(
            f"run.output={output} must not contain `?`: MLflow reads the rest of the path as options of the SQLite "
            f"store in run.output. Rename the folder, or set tracking.uri to another store."
        )
    return f"{_SQLITE}{output.absolute()}/mlflow.db"


def _absolute(uri: str) -> str:
    file = sqlite_file(uri)
    return uri.rstrip("/") if file is None else f"{_SQLITE}{file.absolute()}"
