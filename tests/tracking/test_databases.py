"""Stores that cannot be used: each is named with what is wrong and what to do, at once, and is left as it is."""

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

OLDER = "acf3f17fdcc7"  # a revision of MLflow 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of the installed MLflow; copy it."""
    file = tmp_path_factory.mktemp("made") / "mlflow.db"
    connect(f"sqlite:///{file}")
    return file


@pytest.fixture
def database(made, tmp_path) -> Callable[..., Path]:
    """`database(*statements)` is a copy of one of the installed MLflow's in which these were executed."""

    def copy(*statements: str) -> Path:
        file = Path(shutil.copy(made, tmp_path / "mlflow.db"))
        with closing(sqlite3.connect(file)) as connection, connection:
            for statement in statements:
                connection.execute(statement)
        return file

    return copy


def refused(uri: str, *parts: str) -> UserError:
    with pytest.raises(UserError) as error:
        connect(uri)
    for part in parts:
        assert part in str(error.value), error.value
    with pytest.raises(UserError) as registry:
        connect_registry(Stores("sqlite:////nowhere/x.db", uri))
    assert parts[0] in str(registry.value), registry.value
    return error.value


def test_an_older_databases_cure_is_told_and_it_is_not_migrated_unasked(database):
    """MLflow itself migrates one that lacks a table of its own."""
    for statements in ((), ("DROP TABLE model_version_tags",)):
        file = database(f"UPDATE alembic_version SET version_num = '{OLDER}'", *statements)
        before = file.read_bytes()
        uri = f"sqlite:///{file}"
        fix = f"back it up, end what uses it, and run `mlflow db upgrade '{uri}'`"
        error = refused(uri, f"is of an older MLflow (schema {OLDER})", fix)
        assert not isinstance(error, Unreachable)
        assert file.read_bytes() == before


def test_a_newer_database_is_left_as_it_is(database):
    for statements in ((), ("DROP TABLE model_version_tags",)):
        file = database("UPDATE alembic_version SET version_num = 'ffffffffffff'", *statements)
        refused(f"sqlite:///{file}", "has the schema ffffffffffff, which the installed MLflow", "of a newer MLflow")


def test_files_that_are_no_database_and_folders(tmp_path):
    (tmp_path / "notes.db").write_text("not a database, " * 100)
    refused(f"sqlite:///{tmp_path}/notes.db", "is no SQLite database (file is not a database)")
    refused(f"sqlite:///{tmp_path}", "is a folder: give a file in it, as sqlite:///")
    refused("sqlite:////proc/none/mlflow.db", "cannot be made")
    refused("sqlite:///", "is no address of a file")
    refused("sqlite:///:memory:", "is no address of a file")
    refused("sqlite:/x.db", "is no address of a file")
    refused(f"sqlite:///{tmp_path}/a?b/mlflow.db", "MLflow takes `?` and `%`")
    refused(f"sqlite:///{tmp_path}/a%20b/mlflow.db", "MLflow takes `?` and `%`")
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".lock") == ["notes.db"]


def test_a_path_with_spaces_and_signs_is_a_path(tmp_path):
    connect(f"sqlite:///{tmp_path}/a b 100% é#&/mlflow.db")
    assert (tmp_path / "a b 100% é#&" / "mlflow.db").is_file()


def test_a_locked_database_may_be_free_later(database):
    file = database()
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert isinstance(refused(f"sqlite:///{file}", "is locked by another process"), Unreachable)
        other.execute("ROLLBACK")
    connect(f"sqlite:///{file}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("readonly", ["file", "folder"])
def test_what_this_user_may_not_write_is_named(made, readonly):
    """By a process of another user, since root may write everywhere."""
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
    done = subprocess.run([sys.executable, "-c", code, made, readonly], capture_output=True, text=True)
    assert "cannot be written by this user" in done.stdout, done.stdout + done.stderr


def test_a_disk_that_takes_no_more_is_told(made, tmp_path):
    """A limit on the size of files stands for the disk."""
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
    uris = [f"sqlite:///{made}", f"sqlite:///{tmp_path}/new.db"]
    done = subprocess.run([sys.executable, "-c", code, *uris], capture_output=True, text=True)
    assert f"no MLflow store answers at {uris[1]}: " in done.stdout, done.stdout + done.stderr
    assert "full" in done.stdout or "I/O error" in done.stdout, done.stdout


def test_addresses_of_other_kinds(tmp_path):
    for uri in (f"file://{tmp_path}/mlruns", str(tmp_path / "mlruns"), "mlruns"):
        refused(uri, "is a folder, and MLflow keeps runs in folders no more: write sqlite:///FILE", "migrate-filestore")
    for uri in ("carrier-pigeon://x", "s3://bucket/runs", "ftp://host"):
        refused(uri, f"MLflow knows no store of the kind of {uri}")
    refused("mysql://127.0.0.1:1/x", "needs a driver that is not installed (No module named 'MySQLdb')")
    error = refused("postgresql://me:hunter2@127.0.0.1:1/x", "no database answers at postgresql://me:***@127.0.0.1:1/x")
    assert isinstance(error, Unreachable)
    assert "hunter2" not in str(error)
    assert isinstance(refused("http://127.0.0.1:9", "no MLflow store answers at http://127.0.0.1:9"), Unreachable)


@pytest.fixture
def web() -> Iterator[str]:
    """A web server that is no MLflow; the path says what it answers."""
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
def test_a_server_that_is_no_mlflow_is_told(web, kind):
    assert not isinstance(refused(f"{web}/{kind}", f"what answers at {web}/{kind} is no MLflow server"), Unreachable)
