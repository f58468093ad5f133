"""A short link to a long TMPDIR, as batch systems set it: Linux limits the path length of Ray's Unix sockets."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import UserError

# A Unix socket's path has at most 107 bytes; 68 are Ray's: /ray/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store
MAX_BYTES = 39
_VARIABLES = ("TMPDIR", "RAY_TMPDIR", "TEMP", "TMP")
_LINK_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


@contextmanager
def short_tmpdir() -> Iterator[None]:
    """Replaces temporary folders whose path has more than `MAX_BYTES` bytes by short links.

    Files, for example Ray's logs, are still written to the folder that the user set.

    Raises:
        UserError: No short link can be created.
    """
    long = {name: path for name in _VARIABLES if len(os.fsencode(path := os.environ.get(name, ""))) > MAX_BYTES}
    if not long:
        yield
        return
    links = _folder_for_links(long)
    try:
        for name, path in long.items():
            link = links / name
            _create_folder(name, path)
            link.symlink_to(path)
            os.environ[name] = str(link)
        tempfile.tempdir = None  # clears Python's cached folder
        yield
    finally:
        os.environ.update(long)
        tempfile.tempdir = None
        shutil.rmtree(links, ignore_errors=True)


def _create_folder(name: str, path: str) -> None:
    """Creates the folder if it is missing, as Ray does."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}={path} cannot be created: {error.strerror}. Set {name} to another folder.") from error


def _folder_for_links(long: dict[str, str]) -> Path:
    for base in _LINK_FOLDERS:
        with suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="dn-", dir=base))
    name, path = next(iter(long.items()))
    raise UserError(
        f"{name}={path} has {len(os.fsencode(path))} bytes, Ray's sockets allow {MAX_BYTES}, and no short link to it "
        f"can be created in {', '.join(_LINK_FOLDERS)}: set {name} to a folder with a shorter path."
    )
