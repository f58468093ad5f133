"""The tracking store: where it is, a client that fails in seconds, and the run's experiment in it."""

import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import sqlalchemy
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from pipeline.config import Run, RunConfig
from pipeline.errors import UserError

_RETRY_S = 0.5
_REFUSED = re.compile(r"\b(401|403)\b|PERMISSION_DENIED|Unauthorized|Invalid Host header")


def tracking_uri(config: RunConfig) -> str:
    """The config's tracking URI, else MLFLOW_TRACKING_URI, else a SQLite file in `run.output`; paths are absolute."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{config.run.output}/mlflow.db"
    path = uri.removeprefix("sqlite:///")
    return f"sqlite:///{Path(path).absolute()}" if path != uri else uri


def default_tracking_uri() -> str:
    """Where a run with an untouched `tracking` section and `run.output` writes, seen from this folder."""
    return tracking_uri(RunConfig(run=Run(output=str(Path("outputs").absolute()))))


def shown(uri: str) -> str:
    """The URI without its password, for messages."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def connect(uri: str) -> MlflowClient:
    """A client for tracking and registry at `uri`, which fails in seconds and keeps quiet on the terminal."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _one_at_a_time(uri):
            _check_database(uri)
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        if _REFUSED.search(str(error)):
            raise UserError(
                f"MLflow at {shown(uri)} refuses this user: {first_line(error, uri)} Set MLFLOW_TRACKING_USERNAME and "
                f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; where its host name is refused, start the server "
                f"with --allowed-hosts."
            ) from error
        raise UserError(
            f"no MLflow tracking store answers at {shown(uri)}: {first_line(error, uri)} Start the server, or "
            f"set tracking.uri, --uri or MLFLOW_TRACKING_URI to another; unset, a SQLite file is used."
        ) from error
    return client


def _check_database(uri: str) -> None:
    """Connects to a database server once: MLflow itself would go on trying for more than a minute."""
    scheme = uri.partition("://")[0].partition("+")[0]
    if scheme in DATABASE_ENGINES and scheme != "sqlite":
        engine = sqlalchemy.create_engine(uri, poolclass=NullPool)
        with engine.connect():
            pass


def wait_for(uri: str, patience_s: float, told: Callable[[str], None]) -> None:
    """Waits until the store at `uri` answers; `told` gets one message where it does not at once.

    Raises:
        UserError: it has not answered for so long.
    """
    deadline, waits = time.monotonic() + patience_s, False
    while True:
        try:
            connect(uri)
            return
        except UserError:
            if time.monotonic() >= deadline:
                raise
        if not waits:
            told(f"MLflow at {shown(uri)} does not answer; waiting up to {patience_s:g} s for it (tracking.patience_s)")
            waits = True
        time.sleep(_RETRY_S)


def experiment_id(client: MlflowClient, config: RunConfig, uri: str) -> str:
    """The experiment's id; beside a SQLite file its artifacts go to the folder `mlartifacts`."""
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        path = uri.removeprefix("sqlite:///")
        location = (Path(path).parent / "mlartifacts").as_uri() if path != uri else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another driver may have been first
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(f"tracking.experiment={name} is deleted in {shown(uri)}: restore it, or choose another name.")
    return found.experiment_id


def first_line(error: Exception, uri: str) -> str:
    """The first line of an error's text, without the password of `uri`."""
    return (str(error).splitlines() or [type(error).__name__])[0].replace(uri, shown(uri))


def _one_at_a_time(uri: str) -> AbstractContextManager[object]:
    """Keeps processes from making the tables of the same new SQLite file at the same time, which MLflow fails at."""
    if not uri.startswith("sqlite:///"):
        return nullcontext()
    file = Path(uri.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file.with_name(f"{file.name}.lock"))
