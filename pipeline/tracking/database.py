"""Checks the database of an MLflow store before MLflow opens it.

MLflow retries for more than a minute if a file is not a database, writes to another file if the path contains a `?`,
and migrates an older database without asking if its own schema has new tables.
"""

import os
import re
import sqlite3
from pathlib import Path

import sqlalchemy
from mlflow.store import db_migrations
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.version import VERSION
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from pipeline.errors import UserError
from pipeline.tracking.stores import redacted, sqlite_file

_REVISION = re.compile(r'^revision = "(\w+)"', re.MULTILINE)
_DOWN_REVISION = re.compile(r'^down_revision = "(\w+)"', re.MULTILINE)
_LOCK_TIMEOUT_S = 5.0
_OTHERWISE = "or set tracking.uri, --uri or MLFLOW_TRACKING_URI to another store"


class Unreachable(UserError):
    """A store is unreachable now, and may be reachable later."""


def is_database(uri: str) -> bool:
    """Whether `uri` is a database that MLflow's client accesses directly, without a server."""
    return uri.partition(":")[0].partition("+")[0] in DATABASE_ENGINES


def check_database(uri: str) -> None:
    """Checks that the database can be opened and written, and is empty or has the schema of the installed MLflow.

    Raises:
        Unreachable: The database is locked, or its server is unreachable.
        UserError: It is not a database, is not writable, or belongs to another version of MLflow.
    """
    file = sqlite_file(uri)
    if file is not None and file.exists():
        _check_writable(file, redacted(uri))
    try:
        engine = sqlalchemy.create_engine(uri, poolclass=NullPool)
        with engine.connect() as connection:  # one attempt: MLflow itself retries for more than a minute
            if not sqlalchemy.inspect(connection).has_table("alembic_version"):
                return
            revision = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).scalar()
    except ImportError as error:
        raise UserError(
            f"{redacted(uri)} needs a database driver that is not installed ({error}): install it, {_OTHERWISE}."
        ) from error
    except SQLAlchemyError as error:
        reason = (str(error).splitlines() or [""])[0].replace(uri, redacted(uri))
        if isinstance(error, sqlalchemy.exc.ArgumentError):
            raise UserError(f"{redacted(uri)} is not a database URI: {reason}. Correct it, {_OTHERWISE}.") from error
        raise Unreachable(
            f"the database at {redacted(uri)} is unreachable: {reason}. Start its server, {_OTHERWISE}. The default is "
            f"a SQLite file."
        ) from error
    _check_schema(uri, revision)


def _check_schema(uri: str, revision: str | None) -> None:
    known, replaced = _schemas()
    if revision in known - replaced:
        return
    if revision in known:
        raise UserError(
            f"the database {redacted(uri)} belongs to an older MLflow (schema {revision}) than the installed "
            f"{VERSION}: back it up, stop all programs that use it, and run `mlflow db upgrade '{redacted(uri)}'`, "
            f"{_OTHERWISE}."
        )
    raise UserError(
        f"the database {redacted(uri)} has the schema {revision}, which the installed MLflow {VERSION} does not know: "
        f"it belongs to a newer MLflow or to another program, and stays unchanged. Install the MLflow version that "
        f"created it, {_OTHERWISE}."
    )


def _schemas() -> tuple[set[str], set[str]]:
    """Returns the schemas that the installed MLflow knows, and those among them that a later one replaces.

    Reads the files of its migrations as text: Alembic imports them all, which takes a third of a second.
    """
    migrations = Path(db_migrations.__path__[0], "versions").glob("*.py")
    text = "\n".join(file.read_text(encoding="utf-8") for file in migrations)
    return set(_REVISION.findall(text)), set(_DOWN_REVISION.findall(text))


def check_file(uri: str) -> None:
    """Checks the path of a SQLite store and creates its folder; ignores other URIs.

    Raises:
        UserError: The path is invalid, or is not writable.
    """
    if not uri.startswith("sqlite"):
        return
    file, name = sqlite_file(uri), redacted(uri)
    if file is None or file.name in ("", ":memory:"):
        raise UserError(f"{name} has no file path: write sqlite:///FILE, {_OTHERWISE}.")
    if "?" in str(file) or re.search("%[0-9a-fA-F]{2}", str(file)):
        raise UserError(
            f"{name}: MLflow decodes `?` and `%` with two digits in the path of a SQLite file, and would write to "
            f"another file. Rename the folder or the file, {_OTHERWISE}."
        )
    if file.is_dir():
        raise UserError(f"{name} is a folder: name a file in it, such as sqlite:///{file}/mlflow.db, {_OTHERWISE}.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{name} cannot be created: {error.strerror}: {error.filename}. Choose another path, {_OTHERWISE}."
        ) from error
    for path in (file.parent, file):
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{name}: this user has no write permission for {path}. Grant it, {_OTHERWISE}.")


def _check_writable(file: Path, name: str) -> None:
    """Begins and rolls back a write transaction of a SQLite file."""
    connection = sqlite3.connect(file, timeout=_LOCK_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise Unreachable(
                f"{name} has been locked by another process for more than {_LOCK_TIMEOUT_S:g} s: end that process "
                f"(`fuser {file}` finds it), {_OTHERWISE}."
            ) from error
        raise UserError(
            f"{name} cannot be written: {error}. Make it writable or free disk space, {_OTHERWISE}."
        ) from error
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{name} is not a SQLite database ({error}) and stays unchanged: name another file, {_OTHERWISE}."
        ) from error
    finally:
        connection.close()
