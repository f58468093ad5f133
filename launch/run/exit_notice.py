"""The exit notice: a small process that prints a message after the driver was killed."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CODE = "import sys; sys.stdin.buffer.read() or sys.stderr.write(sys.argv[1])"


@contextmanager
def exit_notice(message: str) -> Iterator[None]:
    """Prints `message` to standard error if this process is killed, or ended by Ray's core, in the context."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _CODE, f"{message}\n"],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C must not reach it
    )
    try:
        yield
    finally:
        child.communicate(b"no message")
