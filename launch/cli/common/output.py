"""Consoles of the commands; output survives a closed terminal or pipe, and characters that it cannot encode."""

import io
import os
from typing import IO, Any, cast

from rich.console import Console

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def escape_unencodable(*streams: object) -> None:
    """Makes streams write an escape sequence for a character that their encoding lacks, as in the C locale."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def ignore_closed_output(console: Console) -> None:
    """Makes a console drop its output, instead of raising, once its terminal is closed or its pipe has no reader."""
    console.file = cast(IO[str], ClosedOutputStream(console.file))


class ClosedOutputStream:
    """A text stream that drops writes, instead of raising, once its terminal is closed or its pipe has no reader."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes text, or drops it; returns its length in characters."""
        try:
            return self._stream.write(text)
        except OSError:
            self._redirect_to_null()
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        try:
            self._stream.flush()
        except OSError:
            self._redirect_to_null()

    def _redirect_to_null(self) -> None:
        """Redirects the file descriptor to /dev/null, so that buffered text does not fail at the interpreter's exit."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
