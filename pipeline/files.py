"""Files and folders that are there whole or not at all: written aside, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"  # what such names begin with, which no listing of data takes


def _aside(target: Path) -> Path:
    """A name beside it, of this process alone; the ending is kept, which some writers go by."""
    return target.with_name(f"{PARTIAL}{os.getpid()}-{target.name}")


@contextmanager
def atomic_file(file: Path, aside: Path | None = None) -> Iterator[Path]:
    """Yields a name to write to, which becomes `file`; where something fails, nothing is left of it.

    Args:
        file: The name in the end; what is there is replaced.
        aside: The name at first, on the same file system; by default one beside it.
    """
    aside = aside or _aside(file)
    try:
        yield aside
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Writes a whole file in UTF-8."""
    with atomic_file(file) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder, which becomes `folder`; where something fails, nothing is left of it.

    Where `folder` is there by then, another process was first with the same, and it stays.
    """
    aside = _aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
