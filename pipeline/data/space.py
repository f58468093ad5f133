"""Room on the disk, asked for before it is needed."""

import shutil
from pathlib import Path

from pipeline.errors import DataError


def gigabytes(count: float) -> str:
    """A number of bytes for people: `138.2 GB`, `4.0 MB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises `DataError` when the file system of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} has {gigabytes(free)} free, {what} need about {gigabytes(needed)}: make room or choose another "
            f"place."
        )
