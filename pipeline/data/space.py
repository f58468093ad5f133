"""Checks of disk space before writing."""

import shutil
from pathlib import Path

from pipeline.errors import DataError
from pipeline.formatting import format_bytes


def free_bytes(folder: Path) -> int:
    """Returns the bytes that are free on the file system of `folder`."""
    return shutil.disk_usage(folder).free


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises `DataError` if the file system of `folder` has less than `needed` bytes free."""
    free = free_bytes(folder)
    if needed > free:
        raise DataError(
            f"{folder} has {format_bytes(free)} free, {what} need about {format_bytes(needed)}: free disk space or "
            f"choose another folder."
        )
