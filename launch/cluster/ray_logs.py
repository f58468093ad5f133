"""Where Ray's log messages, and what it prints in this process, go; what its processes inherit."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO


@contextmanager
def log_to_file(file: Path) -> Iterator[TextIO]:
    """Appends Ray's log to a file, and yields the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("ray")
    handlers, propagate = logger.handlers[:], logger.propagate
    with file.open("a", encoding="utf-8", buffering=1) as stream:
        logger.handlers, logger.propagate = [logging.StreamHandler(stream)], False
        try:
            yield stream
        finally:
            logger.handlers, logger.propagate = handlers, propagate


@contextmanager
def printed_to(stream: TextIO) -> Iterator[None]:
    """Writes what this process prints to `stream`."""
    with redirect_stdout(stream), redirect_stderr(stream):
        yield


@contextmanager
def ray_process_environment(folder: Path) -> Iterator[None]:
    """Sets what Ray's processes inherit from this one: `folder` as working folder, and an ignored SIGHUP.

    Ray puts the driver's working folder first in its workers' import path, where the user may have another package
    `launch`. A terminal that closes sends SIGHUP to all its processes, and only the driver must handle it.
    """
    main = threading.current_thread() is threading.main_thread()  # only this thread may set signal handlers
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN) if main else None
    try:
        with chdir(folder):
            yield
    finally:
        if main:
            signal.signal(signal.SIGHUP, previous)
