"""Atomic writes of files and folders: each is written under a temporary name, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_PREFIX = ".partial-"  # of temporary names; listings of data ignore them


def _temporary_path(target: Path) -> Path:
    """Returns a name in the same folder, unique to this process; it keeps the suffix, which some writers depend on."""
    return target.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{target.name}")


@contextmanager
def atomic_file(file: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path and renames it to `file` at the end; after an error, removes it.

    Args:
        file: The final path; an existing file is replaced.
        temporary: The temporary path, on the same file system; by default one in the same folder.
    """
    temporary = temporary or _temporary_path(file)
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Writes a file atomically, in UTF-8."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder and renames it to `folder` at the end; after an error, removes it.

    If `folder` exists by then, another process has written the same content first, and its folder stays.
    """
    temporary = _temporary_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
