"""The tracking store and the registry: clients that fail in seconds and say why, and a run's experiment."""

import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking.database import Unreachable, check_database, check_file, is_database
from pipeline.tracking.stores import Stores, redacted, sqlite_file

_RETRY_S = 0.5
# MLflow's clients add these to what they are told, each metric to another program's model: they are not of our runs.
_OTHERS = ("MLFLOW_ACTIVE_MODEL_ID", "_MLFLOW_ACTIVE_MODEL_ID")
_REFUSED = re.compile(r"\b(401|403)\b|PERMISSION_DENIED|Unauthorized|Invalid Host header")
_UNKNOWN = re.compile(r"unsupported URI|features are not supported by the store")
_NO_MLFLOW = re.compile(r"error code 404|not in a valid JSON format|error code 405|error code 501")
_ANOTHER = "set tracking.uri, --uri or MLFLOW_TRACKING_URI to another; unset, a SQLite file is used."
_ANOTHER_REGISTRY = "set tracking.registry_uri, --registry-uri or MLFLOW_REGISTRY_URI to another."


def connect(uri: str) -> MlflowClient:
    """A client for the tracking store at `uri`, which fails in seconds and keeps quiet on the terminal.

    Raises:
        Unreachable: it does not answer now, and may later.
        UserError: it is none, is of another version of MLflow, or refuses this user.
    """
    return _connect(Stores(uri, uri), uri, lambda client: client.search_experiments(max_results=1), _ANOTHER)


def connect_registry(stores: Stores) -> MlflowClient:
    """A client for the registry, all of whose calls go to these two addresses, whatever the environment says.

    Raises:
        Unreachable, UserError: as `connect`.
    """
    other = _ANOTHER_REGISTRY if stores.separate_registry else _ANOTHER
    return _connect(stores, stores.registry, lambda client: client.search_registered_models(max_results=1), other)


def _connect(stores: Stores, uri: str, ask: Callable[[MlflowClient], object], other: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in _OTHERS:
        os.environ.pop(name, None)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _check_scheme(uri, other)
    check_file(uri)
    try:
        with _one_at_a_time(uri):
            if is_database(uri):
                check_database(uri)
            client = MlflowClient(tracking_uri=stores.tracking, registry_uri=stores.registry)
            ask(client)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise _refusal(error, uri, other) from error
    return client


def _check_scheme(uri: str, other: str) -> None:
    scheme = uri.partition(":")[0] if ":" in uri else ""
    if scheme in ("", "file"):
        raise UserError(
            f"{redacted(uri)} is a folder, and MLflow keeps runs in folders no more: write sqlite:///FILE (`mlflow "
            f"migrate-filestore` brings an old folder into one), or {other}"
        )


def _refusal(error: Exception, uri: str, other: str) -> UserError:
    """The error for the user: whose turn it is, and what to do."""
    reason = first_line(error, uri)
    if _UNKNOWN.search(str(error)):
        return UserError(
            f"MLflow knows no store of the kind of {redacted(uri)}: write http://HOST:PORT, sqlite:///FILE or "
            f"postgresql://USER@HOST/DATABASE, or {other}"
        )
    if _REFUSED.search(str(error)):
        return UserError(
            f"MLflow at {redacted(uri)} refuses this user: {reason} Set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; where its host name is refused, start the server "
            f"with --allowed-hosts."
        )
    if uri.startswith("http") and _NO_MLFLOW.search(str(error)):
        return UserError(f"what answers at {redacted(uri)} is no MLflow server: {reason[:200]} Correct it, or {other}")
    return Unreachable(
        f"no MLflow store answers at {redacted(uri)}: {reason} Start the server, or {other}",
    )


def wait_for_stores(stores: Stores, wait_timeout_s: float, told: Callable[[str], None]) -> None:
    """Waits until tracking store and registry answer; `told` gets one message where they do not at once.

    Raises:
        UserError: one has not answered for so long, or answers that it cannot be used.
    """
    deadline, waits = time.monotonic() + wait_timeout_s, False
    while True:
        try:
            connect(stores.tracking)
            if stores.separate_registry:
                connect_registry(stores)
            return
        except Unreachable as error:
            if time.monotonic() >= deadline:
                raise
            reason = str(error).partition(": ")[0]
        if not waits:
            told(f"{reason}; waiting up to {wait_timeout_s:g} s for it (tracking.wait_timeout_s)")
            waits = True
        time.sleep(_RETRY_S)


def experiment_id(client: MlflowClient, config: RunConfig, uri: str) -> str:
    """The experiment's id; where a database holds the runs, its artifacts go to a folder `mlartifacts`.

    That is beside a SQLite file, and in `run.output` for a database server.
    """
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        file = sqlite_file(uri)
        folder = Path(config.run.output).absolute() if file is None else file.parent
        location = (folder / "mlartifacts").as_uri() if is_database(uri) else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another driver may have been first
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment={name} is deleted in {redacted(uri)}: restore it, or choose another name."
        )
    return found.experiment_id


def first_line(error: Exception, uri: str) -> str:
    """The first line of an error's text, without the password of `uri`."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].replace(uri, redacted(uri))


def _one_at_a_time(uri: str) -> AbstractContextManager[object]:
    """Keeps processes from making the tables of the same new SQLite file at the same time, which MLflow fails at."""
    file = sqlite_file(uri)
    return nullcontext() if file is None else FileLock(file.with_name(f"{file.name}.lock"))
