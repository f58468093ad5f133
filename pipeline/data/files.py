"""Random-access reads from files, by several threads or processes."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Protocol

_OPEN_FILES = 256


class File:
    """An open file; it is closed when the last reference is gone."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        """Reads `length` bytes at `offset`, or fewer at the end of the file. Releases the GIL; thread-safe."""
        content = os.pread(self._descriptor, length, offset)
        while 0 < len(content) < length:
            more = os.pread(self._descriptor, length - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class Opener(Protocol):
    """Opens files by path, at any time and from any thread."""

    def open(self, path: Path, /) -> File:
        """Returns the open file; the same path may give another object."""


class Files:
    """Opens files on demand, and keeps the most recently used few hundred open."""

    def __init__(self) -> None:
        self.open = lru_cache(_OPEN_FILES)(File)
