"""Tar archives: where each member's bytes lie, without unpacking, and archives that are the same bytes every time."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipeline.data.listing import is_utf8
from pipeline.errors import DataError

BLOCK = 512
_RECORD = 20 * BLOCK


class Writable(Protocol):
    """What an archive is written to."""

    def write(self, content: bytes, /) -> int:
        """Appends the bytes, and returns their number."""


@dataclass(frozen=True, slots=True)  # there are a million of them
class Member:
    """A regular file in an archive; `offset` is where its bytes begin in the file on disk."""

    name: str
    offset: int
    length: int


class _Window:
    """A part of a file, as a file that can be read and sought."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length = descriptor, offset, length
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        content = os.pread(self._descriptor, left if size < 0 else min(size, left), self._offset + self._at)
        self._at += len(content)
        return content

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + position
        return self._at

    def tell(self) -> int:
        return self._at


def members(path: Path, offset: int = 0, length: int | None = None, where: str | None = None) -> Iterator[Member]:
    """The files in a tar archive, or in one that lies at `offset` inside another; nothing but headers is read.

    `where` names the archive in errors.

    Raises:
        DataError: it is no plain tar archive, it is cut short, or a member is a link or has a name that leads outside.
    """
    where = where or str(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        window = _Window(descriptor, offset, os.fstat(descriptor).st_size if length is None else length)
        try:
            with tarfile.open(fileobj=window, mode="r:") as archive:  # type: ignore[call-overload]
                while (info := archive.next()) is not None:
                    archive.members = []  # which it would keep, all of them
                    _check_name(info, where)
                    if info.isdir():
                        continue
                    if not info.isreg():
                        raise DataError(
                            f"{where}: member {info.name!r} is a link or a device: only files may be there."
                        )
                    end = info.offset_data + info.size
                    if end > window._length:
                        raise DataError(_cut_short(where))
                    yield Member(info.name, offset + info.offset_data, info.size)
                window.seek(archive.offset)
                if window.read(BLOCK) != bytes(BLOCK):
                    raise DataError(_cut_short(where))
        except tarfile.ReadError as error:
            if "unexpected end" in str(error):
                raise DataError(_cut_short(where)) from error
            raise DataError(f"{where} cannot be read as an uncompressed tar archive: {error}.") from error
    finally:
        os.close(descriptor)


def _cut_short(where: str) -> str:
    return f"{where} is cut short: its end mark is missing. Copy or download it again."


def _check_name(info: tarfile.TarInfo, where: str) -> None:
    if not is_utf8(info.name):
        raise DataError(f"{where}: member {info.name.encode(errors='surrogateescape')!r} has a name that is not UTF-8.")
    parts = PurePosixPath(info.name).parts
    if info.name.startswith("/") or ".." in parts or not parts:
        raise DataError(f"{where}: member {info.name!r} has a path that leads outside. Do not use this archive.")


def append(file: Writable, name: str, content: bytes) -> int:
    """Writes a member with neither owner nor time, so that equal content gives equal bytes; returns its length."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    padding = bytes(-len(content) % BLOCK)
    return file.write(info.tobuf(tarfile.USTAR_FORMAT)) + file.write(content) + file.write(padding)


def finish(file: Writable, position: int) -> int:
    """Writes the end mark of an archive of `position` bytes; returns the mark's length."""
    return file.write(bytes(-(position + 2 * BLOCK) % _RECORD + 2 * BLOCK))
