"""A small process beside the driver that tells of an end that the driver itself can no longer tell."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CODE = "import sys; sys.stdin.buffer.read() or sys.stderr.write(sys.argv[1])"


@contextmanager
def exit_notice(message: str) -> Iterator[None]:
    """Prints `message` to the standard error if this process ends inside, killed or ended by Ray's core."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _CODE, f"{message}\n"],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
    )
    try:
        yield
    finally:
        child.communicate(b"still here")
