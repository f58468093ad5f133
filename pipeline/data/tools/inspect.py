"""Looking at images one by one, in many processes: what each is, and what is wrong with it."""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.files import Files
from pipeline.data.images import (
    Header,
    NotAnImage,
    TooLarge,
    Unsupported,
    check_size,
    decode,
    header,
    ignore_pil_warnings,
    orientation,
)
from pipeline.data.index import rows_of

CHUNK = 256  # images in a task
_DIGEST = 16  # bytes of a content hash
_SMALL = 32  # pixels


@dataclass(frozen=True)
class Finding:
    """Something about one image, file or split, of a kind that `KINDS` explains."""

    kind: str
    split: str
    where: str
    detail: str

    @property
    def is_corruption(self) -> bool:
        """Whether it stops a training; else it is only worth knowing."""
        return KINDS[self.kind][0]


KINDS = {  # whether it is corruption, and what it means
    "unreadable": (True, "a file is missing, or cannot be read or decoded to the end"),
    "unsupported": (True, "its pixels have no one meaning in 8 bits"),
    "large": (True, "it has more pixels than --max-pixels"),
    "checksum": (True, "the bytes are not those that were indexed"),
    "size": (True, "width or height are not those that were indexed"),
    "shard": (True, "a shard is not the one that was written"),
    "label": (True, "the label in the shard is not the index's"),
    "unlisted": (True, "a file is there that the index does not know"),
    "count": (True, "the numbers of images or classes are not ImageNet's"),
    "classes": (True, "there is only one class: nothing can be learned"),
    "absent": (False, "classes of which a split has no image"),
    "doubtful": (False, "class names that are allowed and probably not meant"),
    "across": (False, "the same bytes are in training and evaluation"),
    "duplicate": (False, "the same bytes are there twice in a split"),
    "format": (False, "no JPEG, whatever its name says; it is used all the same"),
    "color": (False, "neither RGB nor gray; it is converted"),
    "exif": (False, "EXIF says that it is turned or mirrored, which is not applied"),
    "small": (False, f"a side is shorter than {_SMALL} pixels"),
}


@dataclass(frozen=True)
class Chunk:
    """Some rows of a split, in the index's schema; `decoded`: whether images are decoded to the end.

    Images of more than `max_pixels` are findings, and are not decoded.
    """

    root: Path
    split: str
    table: pa.Table
    decoded: bool
    max_pixels: int


@dataclass
class Looked:
    """What a chunk's images are; those that are no images have width 0."""

    widths_N: NDArray[np.int32]
    heights_N: NDArray[np.int32]
    crc32_N: NDArray[np.uint32]
    digests_N: NDArray[np.void]
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)


def chunks(root: Path, split: str, table: pa.Table, decoded: bool, max_pixels: int) -> Iterator[Chunk]:
    """Cuts a split's table into tasks for `look`."""
    for start in range(0, len(table), CHUNK):
        yield Chunk(root, split, rows_of(table, start, CHUNK), decoded, max_pixels)


def where(path: str, name: str | None, offset: int) -> str:
    """A sample's place, for people."""
    return path if name is None or path.endswith(name) else f"{path} at byte {offset} ({name})"


def look(chunk: Chunk) -> Looked:
    """Reads a chunk's images, and compares them with what the index says of them where it says something."""
    count = len(chunk.table)
    looked = Looked(
        np.zeros(count, np.int32),
        np.zeros(count, np.int32),
        np.zeros(count, np.uint32),
        np.zeros(count, f"V{_DIGEST}"),
    )
    files = Files()
    unopened: set[str] = set()
    names = ("path", "name", "offset", "length", "width", "height", "crc32")
    with ignore_pil_warnings():
        for i, row in enumerate(zip(*(chunk.table[name].to_pylist() for name in names), strict=True)):
            path, name, offset, length, width, height, crc32 = row

            def found(kind: str, detail: str, at: str = where(path, name, offset)) -> None:
                looked.findings.append(Finding(kind, chunk.split, at, detail))

            try:
                content = files.open(chunk.root / path).read(offset, length)
            except OSError as error:
                if path not in unopened:
                    found("unreadable", f"cannot be read ({error.strerror})", path)
                unopened.add(path)
                continue
            looked.crc32_N[i] = zlib.crc32(content)
            looked.digests_N[i] = np.void(hashlib.blake2b(content, digest_size=_DIGEST).digest())
            if len(content) < length:
                found("unreadable", f"{len(content)} of {length} bytes are there")
                continue
            if crc32 is not None and looked.crc32_N[i] != crc32:
                found("checksum", f"CRC-32 is {looked.crc32_N[i]:08x}, indexed as {crc32:08x}")
            try:
                head = header(content, content)
                check_size(head.width, head.height, chunk.max_pixels)
                notes = list(_notes(content, head, path, chunk))
            except NotAnImage as error:
                found({TooLarge: "large", Unsupported: "unsupported"}.get(type(error), "unreadable"), str(error))
                continue
            looked.widths_N[i], looked.heights_N[i] = head.width, head.height
            looked.formats[head.format] += 1
            looked.modes[head.mode] += 1
            if width is not None and (width, height) != (head.width, head.height):
                found("size", f"{head.width} x {head.height}, indexed as {width} x {height}")
            for kind, detail in notes:
                found(kind, detail)
    return looked


def _notes(content: bytes, head: Header, path: str, chunk: Chunk) -> Iterator[tuple[str, str]]:
    if chunk.decoded:
        decode(content, chunk.max_pixels)
        turned = orientation(content)
        if turned not in (None, 1):
            yield "exif", f"orientation {turned}"
    if head.format != "JPEG":
        yield "format", f"is a {head.format}" + (" named as a JPEG" if path.lower().endswith((".jpg", ".jpeg")) else "")
    if head.mode not in ("RGB", "L"):
        yield "color", f"colors are {head.mode}"
    if min(head.width, head.height) < _SMALL:
        yield "small", f"{head.width} x {head.height} pixels"
