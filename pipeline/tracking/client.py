"""MLflow clients for tracking store and registry that fail within seconds with a clear error; a run's experiment."""

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
# With these set, MLflow's client would link our metrics to a model of another program.
_ACTIVE_MODEL_VARIABLES = ("MLFLOW_ACTIVE_MODEL_ID", "_MLFLOW_ACTIVE_MODEL_ID")
_ACCESS_DENIED = re.compile(r"\b(401|403)\b|PERMISSION_DENIED|Unauthorized|Invalid Host header")
_UNSUPPORTED_URI = re.compile(r"unsupported URI|features are not supported by the store")
_NOT_MLFLOW = re.compile(r"error code 404|not in a valid JSON format|error code 405|error code 501")
_OTHER_STORE = (
    "set tracking.uri, --uri or MLFLOW_TRACKING_URI to another store. The default without any of them is a SQLite file."
)
_OTHER_REGISTRY = "set tracking.registry_uri, --registry-uri or MLFLOW_REGISTRY_URI to another store."


def connect(uri: str) -> MlflowClient:
    """Returns a client for the tracking store at `uri` that fails within seconds and prints nothing.

    Raises:
        Unreachable: The store is unreachable now, and may be reachable later.
        UserError: The URI is not an MLflow store, belongs to another version of MLflow, or denies access.
    """
    return _connect(Stores(uri, uri), uri, lambda client: client.search_experiments(max_results=1), _OTHER_STORE)


def connect_registry(stores: Stores) -> MlflowClient:
    """Returns a client for the registry that uses these two URIs, whatever the environment says.

    Raises:
        Unreachable, UserError: As in `connect`.
    """
    hint = _OTHER_REGISTRY if stores.separate_registry else _OTHER_STORE
    return _connect(stores, stores.registry, lambda client: client.search_registered_models(max_results=1), hint)


def _connect(stores: Stores, uri: str, probe: Callable[[MlflowClient], object], hint: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in _ACTIVE_MODEL_VARIABLES:
        os.environ.pop(name, None)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _check_scheme(uri, hint)
    check_file(uri)
    try:
        with _file_lock(uri):
            if is_database(uri):
                check_database(uri)
            client = MlflowClient(tracking_uri=stores.tracking, registry_uri=stores.registry)
            probe(client)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise _user_error(error, uri, hint) from error
    return client


def _check_scheme(uri: str, hint: str) -> None:
    scheme = uri.partition(":")[0] if ":" in uri else ""
    if scheme in ("", "file"):
        raise UserError(
            f"{redacted(uri)} is a folder, and MLflow no longer supports file stores: write sqlite:///FILE (`mlflow "
            f"migrate-filestore` migrates an old folder), or {hint}"
        )


def _user_error(error: Exception, uri: str, hint: str) -> UserError:
    """Turns an error of the client into a message that says what to do."""
    reason = first_line(error, uri)
    if _UNSUPPORTED_URI.search(str(error)):
        return UserError(
            f"MLflow does not support stores like {redacted(uri)}: write http://HOST:PORT, sqlite:///FILE or "
            f"postgresql://USER@HOST/DATABASE, or {hint}"
        )
    if _ACCESS_DENIED.search(str(error)):
        return UserError(
            f"MLflow at {redacted(uri)} denies access: {reason} Set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN. If the message is about the host name, start the "
            f"server with --allowed-hosts."
        )
    if uri.startswith("http") and _NOT_MLFLOW.search(str(error)):
        return UserError(f"the server at {redacted(uri)} is not an MLflow server: {reason[:200]} Correct it, or {hint}")
    return Unreachable(f"the MLflow store at {redacted(uri)} is unreachable: {reason} Start the server, or {hint}")


def wait_for_stores(stores: Stores, wait_timeout_s: float, warn: Callable[[str], None]) -> None:
    """Waits until tracking store and registry are reachable; calls `warn` once if it has to wait.

    Raises:
        UserError: A store is still unreachable after `wait_timeout_s`, or is unusable.
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
            warn(f"{reason}; waiting up to {wait_timeout_s:g} s for it (tracking.wait_timeout_s)")
            waits = True
        time.sleep(_RETRY_S)


def experiment_id(client: MlflowClient, config: RunConfig, uri: str) -> str:
    """Returns the id of the experiment; creates it if necessary.

    If a database stores the runs, the artifact location of a new experiment is a folder `mlartifacts`: next to a SQLite
    file, in `run.output` for a database server.
    """
    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        file = sqlite_file(uri)
        folder = Path(config.run.output).absolute() if file is None else file.parent
        location = (folder / "mlartifacts").as_uri() if is_database(uri) else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another driver may have been first
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment={name} is deleted in {redacted(uri)}: restore it, or choose another name."
        )
    return experiment.experiment_id


def first_line(error: Exception, uri: str) -> str:
    """Returns the first line of an error message, without the password of `uri`."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].replace(uri, redacted(uri))


def _file_lock(uri: str) -> AbstractContextManager[object]:
    """Lets one process at a time create the tables of a new SQLite file: MLflow fails if several do."""
    file = sqlite_file(uri)
    return nullcontext() if file is None else FileLock(file.with_name(f"{file.name}.lock"))
