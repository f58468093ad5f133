"""Unusable stores: the error comes at once, says what is wrong and what to do; the store stays unchanged."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.tracking.client import connect, connect_registry
from pipeline.tracking.database import Unreachable
from pipeline.tracking.stores import Stores

OLDER = "acf3f17fdcc7"  # a schema revision of MLflow 2


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database created by the installed MLflow; copy it."""
    file = tmp_path_factory.mktemp("template") / "mlflow.db"
    connect(f"sqlite:///{file}")
    return file


@pytest.fixture
def database(template, tmp_path) -> Callable[..., Path]:
    """`database(*statements)` copies a database of the installed MLflow and executes SQL statements in the copy."""

    def copy(*statements: str) -> Path:
        file = Path(shutil.copy(template, tmp_path / "mlflow.db"))
        with closing(sqlite3.connect(file)) as connection, connection:
            for statement in statements:
                connection.execute(statement)
        return file

    return copy


def rejected(uri: str, *parts: str) -> UserError:
    with pytest.raises(UserError) as error:
        connect(uri)
    for part in parts:
        assert part in str(error.value), error.value
    with pytest.raises(UserError) as registry:
        connect_registry(Stores("sqlite:////nowhere/x.db", uri))
    assert parts[0] in str(registry.value), registry.value
    return error.value


def test_an_older_database_is_not_migrated_and_the_error_names_the_upgrade_command(database):
    """MLflow itself migrates a database that lacks one of its tables."""
    for statements in ((), ("DROP TABLE model_version_tags",)):
        file = database(f"UPDATE alembic_version SET version_num = '{OLDER}'", *statements)
        before = file.read_bytes()
        uri = f"sqlite:///{file}"
        fix = f"back it up, stop all programs that use it, and run `mlflow db upgrade '{uri}'`"
        error = rejected(uri, f"belongs to an older MLflow (schema {OLDER})", fix)
        assert not isinstance(error, Unreachable)
        assert file.read_bytes() == before


def test_a_newer_database_stays_unchanged(database):
    for statements in ((), ("DROP TABLE model_version_tags",)):
        file = database("UPDATE alembic_version SET version_num = 'ffffffffffff'", *statements)
        rejected(f"sqlite:///{file}", "has the schema ffffffffffff, which the installed MLflow", "to a newer MLflow")


def test_files_that_are_not_databases_and_folders_are_rejected(tmp_path):
    (tmp_path / "notes.db").write_text("not a database, " * 100)
    rejected(f"sqlite:///{tmp_path}/notes.db", "is not a SQLite database (file is not a database)")
    rejected(f"sqlite:///{tmp_path}", "is a folder: name a file in it, such as sqlite:///")
    rejected("sqlite:////proc/none/mlflow.db", "cannot be created")
    rejected("sqlite:///", "has no file path")
    rejected("sqlite:///:memory:", "has no file path")
    rejected("sqlite:/x.db", "has no file path")
    rejected(f"sqlite:///{tmp_path}/a?b/mlflow.db", "MLflow decodes `?` and `%`")
    rejected(f"sqlite:///{tmp_path}/a%20b/mlflow.db", "MLflow decodes `?` and `%`")
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".lock") == ["notes.db"]


def test_a_path_with_spaces_and_special_characters_works(tmp_path):
    connect(f"sqlite:///{tmp_path}/a b 100% é#&/mlflow.db")
    assert (tmp_path / "a b 100% é#&" / "mlflow.db").is_file()


def test_a_locked_database_counts_as_unreachable(database):
    file = database()
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert isinstance(rejected(f"sqlite:///{file}", "has been locked by another process"), Unreachable)
        other.execute("ROLLBACK")
    connect(f"sqlite:///{file}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("readonly", ["file", "folder"])
def test_missing_write_permission_is_reported(template, readonly):
    """In a process of another user, since root may write everywhere."""
    code = """
import os, shutil, sys, tempfile
from pathlib import Path
from pipeline.errors import UserError
from pipeline.tracking.client import connect
folder = Path(tempfile.mkdtemp())
os.chown(folder, 65534, 65534)
file = shutil.copy(sys.argv[1], folder / "mlflow.db")
os.chown(file, 65534, 65534)
os.chmod(file if sys.argv[2] == "file" else folder, 0o500)
os.setuid(65534)
try:
    connect(f"sqlite:///{file}")
except UserError as error:
    print(error)
finally:
    shutil.rmtree(folder, ignore_errors=True)
"""
    done = subprocess.run([sys.executable, "-c", code, template, readonly], capture_output=True, text=True)
    assert "this user has no write permission for" in done.stdout, done.stdout + done.stderr


def test_a_full_disk_is_reported(template, tmp_path):
    """Simulates a full disk by a limit on the file size."""
    code = """
import resource, signal, sys
from pipeline.errors import UserError
from pipeline.tracking.client import connect
connect(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    connect(sys.argv[2])
except UserError as error:
    print(error)
"""
    uris = [f"sqlite:///{template}", f"sqlite:///{tmp_path}/new.db"]
    done = subprocess.run([sys.executable, "-c", code, *uris], capture_output=True, text=True)
    assert f"the MLflow store at {uris[1]} is unreachable: " in done.stdout, done.stdout + done.stderr
    assert "full" in done.stdout or "I/O error" in done.stdout, done.stdout


def test_unsupported_and_unreachable_uris(tmp_path):
    for uri in (f"file://{tmp_path}/mlruns", str(tmp_path / "mlruns"), "mlruns"):
        rejected(
            uri, "is a folder, and MLflow no longer supports file stores: write sqlite:///FILE", "migrate-filestore"
        )
    for uri in ("carrier-pigeon://x", "s3://bucket/runs", "ftp://host"):
        rejected(uri, f"MLflow does not support stores like {uri}")
    rejected("mysql://127.0.0.1:1/x", "needs a database driver that is not installed (No module named 'MySQLdb')")
    message = "the database at postgresql://me:***@127.0.0.1:1/x is unreachable"
    error = rejected("postgresql://me:hunter2@127.0.0.1:1/x", message)
    assert isinstance(error, Unreachable)
    assert "hunter2" not in str(error)
    error = rejected("http://127.0.0.1:9", "the MLflow store at http://127.0.0.1:9 is unreachable")
    assert isinstance(error, Unreachable)


@pytest.fixture
def web() -> Iterator[str]:
    """A web server that is not MLflow; the path selects the response."""
    pages = {"page": (200, b"<html>welcome</html>"), "missing": (404, b"<html>nothing</html>"), "list": (200, b"[1]")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = pages[self.path.split("/")[1]]
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["page", "missing", "list"])
def test_a_server_that_is_not_mlflow_is_rejected(web, kind):
    error = rejected(f"{web}/{kind}", f"the server at {web}/{kind} is not an MLflow server")
    assert not isinstance(error, Unreachable)
