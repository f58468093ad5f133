"""Disk space: checks before writing, and sizes as text."""

import shutil
from pathlib import Path

from pipeline.errors import DataError


def format_bytes(count: float) -> str:
    """Formats a number of bytes: `138.2 GB`, `4.0 MB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises `DataError` if the file system of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} has {format_bytes(free)} free, {what} need about {format_bytes(needed)}: free disk space or "
            f"choose another folder."
        )
