"""A long TMPDIR, as batch systems give: the paths of Unix sockets below it would be longer than Linux allows."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import UserError

# A Unix socket's path has at most 107 bytes; 68 are Ray's: /ray/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store
LONGEST = 39
_VARIABLES = ("TMPDIR", "RAY_TMPDIR", "TEMP", "TMP")
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


@contextmanager
def short_tmpdir() -> Iterator[None]:
    """Puts a short link to the temporary folder in the place of a path of more than `LONGEST` bytes.

    What is written there, Ray's logs for one, still lies in the folder that the user chose.

    Raises:
        UserError: no short link can be made.
    """
    long = {name: path for name in _VARIABLES if len(os.fsencode(path := os.environ.get(name, ""))) > LONGEST}
    if not long:
        yield
        return
    links = _folder_for_links(long)
    try:
        for name, path in long.items():
            link = links / name
            _make(name, path)
            link.symlink_to(path)
            os.environ[name] = str(link)
        tempfile.tempdir = None  # Python remembers the folder
        yield
    finally:
        os.environ.update(long)
        tempfile.tempdir = None
        shutil.rmtree(links, ignore_errors=True)


def _make(name: str, path: str) -> None:
    """Makes the folder where it is missing, as Ray would."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}={path} cannot be made: {error.strerror}. Set {name} to another folder.") from error


def _folder_for_links(long: dict[str, str]) -> Path:
    for base in _SHORT:
        with suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="dn-", dir=base))
    name, path = next(iter(long.items()))
    raise UserError(
        f"{name}={path} has {len(os.fsencode(path))} bytes, Ray's sockets allow {LONGEST}, and no short link to it can "
        f"be made in {', '.join(_SHORT)}: set {name} to a folder with a shorter path."
    )
