"""The run lock, which allows one driver per run folder, and the probe file that shows nodes a shared folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.files import write_text

PROBE = "config.yaml"  # the driver writes it; a node that does not see it does not share the run folder


@contextmanager
def run_lock(run_dir: Path, config: RunConfig) -> Iterator[None]:
    """Locks the run folder, and writes the config into it, which serves as the probe file.

    Raises:
        UserError: another driver holds the lock.
    """
    with folder_lock(run_dir):
        write_text(run_dir / PROBE, config.to_yaml())
        yield


@contextmanager
def folder_lock(run_dir: Path) -> Iterator[None]:
    """Locks the run folder against other drivers.

    Raises:
        UserError: another driver holds the lock.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_dir / "driver.lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(
            f"run.name={run_dir.name} is being trained by another process in {run_dir}: wait until it ends, or "
            f"choose another run.name."
        ) from error
