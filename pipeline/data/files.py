"""Files that are read at positions, by several threads or processes."""

import os
from functools import lru_cache
from pathlib import Path

_OPEN_FILES = 256


class File:
    """An open file; it is closed when nobody holds it any longer."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`: `length` of them, or fewer where the file ends. Other threads go on meanwhile."""
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


class Files:
    """Opens files as they are asked for, and keeps the last few hundred open."""

    def __init__(self) -> None:
        self.open = lru_cache(_OPEN_FILES)(File)
