"""Tar archives: finds the members' bytes without unpacking, and writes archives with reproducible bytes."""

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
    """The file that an archive is written to."""

    def write(self, content: bytes, /) -> int:
        """Appends the bytes, and returns their number."""


@dataclass(frozen=True, slots=True)  # an archive has a million of them
class Member:
    """A regular file in an archive; `offset` is the position of its first byte in the file on disk."""

    name: str
    offset: int
    length: int


class _FileSlice:
    """A part of a file, with the interface of a seekable file."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length = descriptor, offset, length
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        content = os.pread(self._descriptor, left if size < 0 else min(size, left), self._offset + self._position)
        self._position += len(content)
        return content

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + position
        return self._position

    def tell(self) -> int:
        return self._position


def read_members(path: Path, offset: int = 0, length: int | None = None, where: str | None = None) -> Iterator[Member]:
    """Yields the files of a tar archive, or of an archive at `offset` inside another one; reads headers only.

    `where` names the archive in errors.

    Raises:
        DataError: the file is not an uncompressed tar archive or is truncated, or a member is a link or has a path
            outside the archive.
    """
    where = where or str(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        file_slice = _FileSlice(descriptor, offset, os.fstat(descriptor).st_size if length is None else length)
        try:
            with tarfile.open(fileobj=file_slice, mode="r:") as archive:  # type: ignore[call-overload]
                while (info := archive.next()) is not None:
                    archive.members = []  # tarfile would keep all members in memory
                    _check_name(info, where)
                    if info.isdir():
                        continue
                    if not info.isreg():
                        raise DataError(f"{where}: member {info.name!r} is a link or a device: only files are allowed.")
                    end = info.offset_data + info.size
                    if end > file_slice._length:
                        raise DataError(_truncated(where))
                    yield Member(info.name, offset + info.offset_data, info.size)
                file_slice.seek(archive.offset)
                if file_slice.read(BLOCK) != bytes(BLOCK):
                    raise DataError(_truncated(where))
        except tarfile.ReadError as error:
            if "unexpected end" in str(error):
                raise DataError(_truncated(where)) from error
            raise DataError(f"{where} cannot be read as an uncompressed tar archive: {error}.") from error
    finally:
        os.close(descriptor)


def _truncated(where: str) -> str:
    return f"{where} is truncated: its end-of-archive marker is missing. Copy or download it again."


def _check_name(info: tarfile.TarInfo, where: str) -> None:
    if not is_utf8(info.name):
        raise DataError(f"{where}: member {info.name.encode(errors='surrogateescape')!r} has a name that is not UTF-8.")
    parts = PurePosixPath(info.name).parts
    if info.name.startswith("/") or ".." in parts or not parts:
        raise DataError(f"{where}: member {info.name!r} has a path outside the archive. Do not use this archive.")


def append_member(file: Writable, name: str, content: bytes) -> int:
    """Writes a member without owner and time, so that equal content gives equal bytes; returns its length."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    padding = bytes(-len(content) % BLOCK)
    return file.write(info.tobuf(tarfile.USTAR_FORMAT)) + file.write(content) + file.write(padding)


def write_end(file: Writable, position: int) -> int:
    """Writes the end-of-archive marker of an archive of `position` bytes; returns the marker's length."""
    return file.write(bytes(-(position + 2 * BLOCK) % _RECORD + 2 * BLOCK))
