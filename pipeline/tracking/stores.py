"""The two addresses of a run or a command, chosen once: where runs are kept, and where models are registered."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.errors import UserError

TRACKING_VARIABLE, REGISTRY_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Stores:
    """MLflow's addresses; with passwords, where the environment's have them: show `redacted(uri)`."""

    tracking: str
    registry: str

    @property
    def separate_registry(self) -> bool:
        """Whether models are registered elsewhere than runs are kept."""
        return self.tracking != self.registry

    def options(self) -> str:
        """The options by which a command finds these stores, each after a space; none where it does so by itself.

        A registry apart is named although the environment has it: a variable is soon set for one command alone. Not one
        with a password.
        """
        found, usual = "", stores_from_options(None, None)
        if self.tracking != usual.tracking:
            found += f" --uri {shlex.quote(redacted(self.tracking))}"
            usual = stores_from_options(self.tracking, None)
        named = self.separate_registry and redacted(self.registry) == self.registry
        if self.registry != usual.registry or named:
            found += f" --registry-uri {shlex.quote(redacted(self.registry))}"
        return found


def stores_from_config(config: RunConfig) -> Stores:
    """A run's stores.

    Tracking is `tracking.uri`, else MLFLOW_TRACKING_URI, else a SQLite file in `run.output`; the registry is
    `tracking.registry_uri`, else MLFLOW_REGISTRY_URI, else the tracking store.

    Raises:
        UserError: the path of `run.output` cannot be part of a SQLite address.
    """
    return _stores(config.tracking.uri, config.tracking.registry_uri, Path(config.run.output))


def stores_from_options(uri: str | None, registry_uri: str | None, output: Path = Path("outputs")) -> Stores:
    """The stores that a command was given; else those of a run whose config names none."""
    return _stores(uri, registry_uri, output)


def redacted(uri: str) -> str:
    """The URI without its password, for messages."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", uri)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None where the URI is another's."""
    path = uri.removeprefix(_SQLITE)
    return None if path == uri else Path(path)


def _stores(uri: str | None, registry_uri: str | None, output: Path) -> Stores:
    tracking = uri or os.environ.get(TRACKING_VARIABLE) or _default(output)
    registry = registry_uri or os.environ.get(REGISTRY_VARIABLE) or tracking
    return Stores(_absolute(tracking), _absolute(registry))


def _default(output: Path) -> str:
    if "?" in str(output.absolute()):
        raise UserError(
            f"run.output={output}: MLflow takes what follows a `?` for options of its SQLite store, which is in "
            f"run.output by default. Rename the folder, or set tracking.uri to another store."
        )
    return f"{_SQLITE}{output.absolute()}/mlflow.db"


def _absolute(uri: str) -> str:
    file = sqlite_file(uri)
    return uri.rstrip("/") if file is None else f"{_SQLITE}{file.absolute()}"
