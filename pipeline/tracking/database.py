"""Databases that MLflow is to keep runs or models in, looked at before MLflow touches them.

MLflow would try for more than a minute to open what is no database, writes to another file where a path has a `?`, and
brings an older database to its own schema without a question where that has new tables.
"""

import os
import re
import sqlite3
from pathlib import Path

import sqlalchemy
from alembic.script import ScriptDirectory
from mlflow.store import db_migrations
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.version import VERSION
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from pipeline.errors import UserError
from pipeline.tracking.stores import redacted, sqlite_file

_LOCK_S = 5.0
_OTHERWISE = "or set tracking.uri, --uri or MLFLOW_TRACKING_URI to another store"


class Unreachable(UserError):
    """A store that does not answer now, and may later."""


def is_database(uri: str) -> bool:
    """Whether MLflow would talk to a database at `uri` itself."""
    return uri.partition(":")[0].partition("+")[0] in DATABASE_ENGINES


def check_database(uri: str) -> None:
    """Looks whether the database can be opened, written, and has this MLflow's schema or none.

    Raises:
        Unreachable: it is locked, or its server does not answer.
        UserError: it is no database, cannot be written, or belongs to another version of MLflow.
    """
    file = sqlite_file(uri)
    if file is not None and file.exists():
        _begin(file, redacted(uri))
    try:
        engine = sqlalchemy.create_engine(uri, poolclass=NullPool)
        with engine.connect() as connection:  # once: MLflow itself would go on trying for more than a minute
            if not sqlalchemy.inspect(connection).has_table("alembic_version"):
                return
            revision = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).scalar()
    except ImportError as error:
        raise UserError(
            f"{redacted(uri)} needs a driver that is not installed ({error}): install it, {_OTHERWISE}."
        ) from error
    except SQLAlchemyError as error:
        reason = (str(error).splitlines() or [""])[0].replace(uri, redacted(uri))
        if isinstance(error, sqlalchemy.exc.ArgumentError):
            raise UserError(
                f"{redacted(uri)} is no address of a database: {reason}. Correct it, {_OTHERWISE}."
            ) from error
        raise Unreachable(
            f"no database answers at {redacted(uri)}: {reason}. Start its server, {_OTHERWISE}; unset, a SQLite file is "
            f"used."
        ) from error
    _check_schema(uri, revision)


def _check_schema(uri: str, revision: str | None) -> None:
    scripts = ScriptDirectory(str(Path(db_migrations.__path__[0])))
    if revision in scripts.get_heads():
        return
    if revision in {script.revision for script in scripts.walk_revisions()}:
        raise UserError(
            f"the database {redacted(uri)} is of an older MLflow (schema {revision}) than the installed {VERSION}: back "
            f"it up, end what uses it, and run `mlflow db upgrade '{redacted(uri)}'`, {_OTHERWISE}."
        )
    raise UserError(
        f"the database {redacted(uri)} has the schema {revision}, which the installed MLflow {VERSION} does not know: it "
        f"is of a newer MLflow, or of another program. Leave it so; install the MLflow that made it, {_OTHERWISE}."
    )


def check_file(uri: str) -> None:
    """Looks where a SQLite file is or would be; its folder is made. Other addresses are not looked at.

    Raises:
        UserError: there can be none, or it cannot be written.
    """
    if not uri.startswith("sqlite"):
        return
    file, name = sqlite_file(uri), redacted(uri)
    if file is None or file.name in ("", ":memory:"):
        raise UserError(f"{name} is no address of a file: write sqlite:///FILE, with a path, {_OTHERWISE}.")
    if "?" in str(file) or re.search("%[0-9a-fA-F]{2}", str(file)):
        raise UserError(
            f"{name}: MLflow takes `?` and `%` with two digits in a SQLite file's path for something else, and would "
            f"write elsewhere. Rename the folder or the file, {_OTHERWISE}."
        )
    if file.is_dir():
        raise UserError(f"{name} is a folder: give a file in it, as sqlite:///{file}/mlflow.db, {_OTHERWISE}.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{name} cannot be made: {error.strerror}: {error.filename}. Choose another, {_OTHERWISE}."
        ) from error
    for place in (file.parent, file):
        if place.exists() and not os.access(place, os.W_OK):
            raise UserError(f"{name}: {place} cannot be written by this user. Give it that right, {_OTHERWISE}.")


def _begin(file: Path, name: str) -> None:
    """Begins to write to a SQLite file, and leaves it as it is."""
    connection = sqlite3.connect(file, timeout=_LOCK_S, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise Unreachable(
                f"{name} is locked by another process for more than {_LOCK_S:g} s: end it (`fuser {file}` names it), "
                f"{_OTHERWISE}."
            ) from error
        raise UserError(f"{name} cannot be written: {error}. Make it writable or make room, {_OTHERWISE}.") from error
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{name} is no SQLite database ({error}). It is left as it is: give another file, {_OTHERWISE}."
        ) from error
    finally:
        connection.close()
