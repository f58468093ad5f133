"""One driver a run folder, and the file by which nodes know that they see the driver's folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.files import write_text

PROBE = "config.yaml"  # in the run's folder, of the driver's making: a node that does not see it has another folder


@contextmanager
def run_lock(run_dir: Path, config: RunConfig) -> Iterator[None]:
    """Keeps other drivers from the run's folder, and leaves the config there, by which nodes know the folder.

    Raises:
        UserError: another driver has it.
    """
    with folder_lock(run_dir):
        write_text(run_dir / PROBE, config.to_yaml())
        yield


@contextmanager
def folder_lock(run_dir: Path) -> Iterator[None]:
    """Keeps other drivers from the run's folder.

    Raises:
        UserError: another driver has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_dir / "driver.lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(
            f"run.name={run_dir.name} is being trained by another process in {run_dir}: wait for its end, or choose "
            f"another run.name."
        ) from error
