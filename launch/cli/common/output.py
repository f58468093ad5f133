"""The consoles of all commands, which nobody may read any longer, or whose terminal cannot show a character."""

import io
import os
from typing import IO, Any, cast

from rich.console import Console

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def write_any_text(*streams: object) -> None:
    """Lets streams whose encoding lacks a character, as in the C locale, write it as an escape sequence."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def outlive_readers(console: Console) -> None:
    """Lets a console print into nothing instead of failing, once its terminal is closed or its pipe has no reader."""
    console.file = cast(IO[str], LastingStream(console.file))


class LastingStream:
    """A text stream whose writes are lost once its terminal is closed or its pipe has no reader, instead of failing."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes text, or nothing; returns its length, characters."""
        try:
            return self._stream.write(text)
        except OSError:
            self._to_nowhere()
        return len(text)

    def flush(self) -> None:
        """Flushes what was written."""
        try:
            self._stream.flush()
        except OSError:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        """What is left in buffers, also at the interpreter's end, goes there too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
