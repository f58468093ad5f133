"""Zeroes the code that a shared library holds for other CUDA architectures; size and layout stay the same.

A CUDA library has fat binaries in the ELF sections `.nv_fatbin` and `__nv_relfatbin`: headers of 16 bytes, each
followed by entries (machine code for one architecture, or PTX) with headers of their own, by which the driver chooses.
It never reads the payload of the other entries, and zeros compress to nothing.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC, _NO_BITS = 0xBA55ED50, 8
_MACHINE_CODE = 2  # kind of an entry; PTX is 1
_FATBIN_SECTIONS, _SYMBOL_SECTIONS = (".nv_fatbin", "__nv_relfatbin"), (".symtab", ".strtab")


@dataclass(frozen=True)
class Entry:
    """Code for one architecture: its payload is at `start`:`end`."""

    kind: int
    architecture: int
    start: int
    end: int


def keep_architecture(library: bytearray, architecture: int) -> None:
    """Zeroes all code for other architectures, and the debugger's symbols.

    Keeps all code if the library has no machine code for `architecture`.

    Raises:
        ValueError: the fat binaries do not have the layout above.
    """
    found = list(entries(library))
    if any(entry.kind == _MACHINE_CODE and entry.architecture == architecture for entry in found):
        for entry in found:
            if (entry.kind, entry.architecture) != (_MACHINE_CODE, architecture):
                library[entry.start : entry.end] = bytes(entry.end - entry.start)
    for name in _SYMBOL_SECTIONS:
        offset, size = _sections(library).get(name, (0, 0))
        library[offset : offset + size] = bytes(size)


def entries(library: bytes | bytearray) -> Iterator[Entry]:
    """Yields the entries of all fat binaries."""
    sections = _sections(library)
    for name in _FATBIN_SECTIONS:
        offset, size = sections.get(name, (0, 0))
        end = offset + size
        while offset + 16 <= end:
            magic, _, header, length = struct.unpack_from("<IHHQ", library, offset)
            if magic != _MAGIC:  # padding
                offset += 8
                continue
            entry, offset = offset + header, offset + header + length
            while entry < offset:
                kind, _, header, length = struct.unpack_from("<HHIQ", library, entry)
                (architecture,) = struct.unpack_from("<I", library, entry + 28)
                yield Entry(kind, architecture, entry + header, entry + header + length)
                entry += header + length
            if entry != offset:
                raise ValueError(f"{name}: an entry ends at byte {entry}, its fat binary at byte {offset}")


def _sections(library: bytes | bytearray) -> dict[str, tuple[int, int]]:
    """Returns offset and size of each section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", library, 40)
    size, count, names_index = struct.unpack_from("<HHH", library, 58)
    headers = [struct.unpack_from("<IIQQQQ", library, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    return {
        bytes(library[names + header[0] : library.index(b"\0", names + header[0])]).decode(): (header[4], header[5])
        for header in headers
        if header[1] != _NO_BITS
    }
