"""Checks of single images, run in parallel processes: size, format, color mode, checksum and corruption."""

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
from pipeline.data.tools.rows import Rows

CHUNK_IMAGES = 256  # images per task
_DIGEST_BYTES = 16  # length of a content hash
_SMALL_SIDE = 32  # pixels


@dataclass(frozen=True)
class Finding:
    """An error or remark about one image, file or split; `FINDING_KINDS` explains its `kind`."""

    kind: str
    split: str
    where: str
    detail: str

    @property
    def is_error(self) -> bool:
        """Whether the data must not be trained on; other findings are remarks."""
        return FINDING_KINDS[self.kind][0]


FINDING_KINDS = {  # whether it is an error, and its meaning
    "unreadable": (True, "a file is missing, or cannot be read or decoded completely"),
    "unsupported": (True, "the pixels have no unambiguous 8-bit value"),
    "large": (True, "an image has more pixels than --max-pixels"),
    "checksum": (True, "an image's bytes differ from the index"),
    "size": (True, "an image's width or height differs from the index"),
    "shard": (True, "a shard differs from the one that was written"),
    "label": (True, "the label in the shard differs from the index"),
    "unlisted": (True, "a file is not in the index"),
    "count": (True, "the number of images or classes is not ImageNet's"),
    "classes": (True, "there is only one class: nothing can be learned"),
    "absent": (False, "classes without an image in a split"),
    "doubtful": (False, "class names that are allowed and probably not intended"),
    "across": (False, "the same bytes are in the training and the evaluation split"),
    "duplicate": (False, "the same bytes occur twice in a split"),
    "format": (False, "the content is not a JPEG, whatever the file name; it is used"),
    "color": (False, "neither RGB nor gray; it is converted"),
    "exif": (False, "EXIF orientation is rotated or mirrored, and is not applied"),
    "small": (False, f"a side is shorter than {_SMALL_SIDE} pixels"),
}


@dataclass(frozen=True)
class Chunk:
    """Some rows of a split in the index's schema; `decode` decodes the images completely.

    Images of more than `max_pixels` are findings, and are not decoded.
    """

    root: Path
    split: str
    rows: Rows
    decode: bool
    max_pixels: int


@dataclass
class ImageChecks:
    """Properties and findings of a chunk's images; unreadable images have width 0."""

    widths_N: NDArray[np.int32]
    heights_N: NDArray[np.int32]
    crc32_N: NDArray[np.uint32]
    digests_N: NDArray[np.void]
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)


def iter_chunks(root: Path, split: str, table: pa.Table, decode: bool, max_pixels: int) -> Iterator[Chunk]:
    """Divides a split's table into tasks for `check_images`."""
    for start in range(0, len(table), CHUNK_IMAGES):
        yield Chunk(root, split, Rows(table.slice(start, CHUNK_IMAGES)), decode, max_pixels)


def describe_location(path: str, name: str | None, offset: int) -> str:
    """Returns a sample's file, and its offset and name if the file is an archive, for messages."""
    return path if name is None or path.endswith(name) else f"{path} at byte {offset} ({name})"


def check_images(chunk: Chunk) -> ImageChecks:
    """Reads a chunk's images, and compares them with the index's sizes and checksums if it has them."""
    count = len(chunk.rows)
    checks = ImageChecks(
        np.zeros(count, np.int32),
        np.zeros(count, np.int32),
        np.zeros(count, np.uint32),
        np.zeros(count, f"V{_DIGEST_BYTES}"),
    )
    files = Files()
    unopened: set[str] = set()
    names = ("path", "name", "offset", "length", "width", "height", "crc32")
    table = chunk.rows.table()
    with ignore_pil_warnings():
        for i, row in enumerate(zip(*(table[name].to_pylist() for name in names), strict=True)):
            path, name, offset, length, width, height, crc32 = row

            def add(kind: str, detail: str, where: str = describe_location(path, name, offset)) -> None:
                checks.findings.append(Finding(kind, chunk.split, where, detail))

            try:
                content = files.open(chunk.root / path).read(offset, length)
            except OSError as error:
                if path not in unopened:
                    add("unreadable", f"cannot be read ({error.strerror})", path)
                unopened.add(path)
                continue
            checks.crc32_N[i] = zlib.crc32(content)
            checks.digests_N[i] = np.void(hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest())
            if len(content) < length:
                add("unreadable", f"only {len(content)} of {length} bytes exist")
                continue
            if crc32 is not None and checks.crc32_N[i] != crc32:
                add("checksum", f"CRC-32 is {checks.crc32_N[i]:08x}, indexed as {crc32:08x}")
            try:
                head = header(content, content)
                check_size(head.width, head.height, chunk.max_pixels)
                remarks = list(_remarks(content, head, path, chunk))
            except NotAnImage as error:
                add({TooLarge: "large", Unsupported: "unsupported"}.get(type(error), "unreadable"), str(error))
                continue
            checks.widths_N[i], checks.heights_N[i] = head.width, head.height
            checks.formats[head.format] += 1
            checks.modes[head.mode] += 1
            if width is not None and (width, height) != (head.width, head.height):
                add("size", f"{head.width} x {head.height}, indexed as {width} x {height}")
            for kind, detail in remarks:
                add(kind, detail)
    return checks


def _remarks(content: bytes, head: Header, path: str, chunk: Chunk) -> Iterator[tuple[str, str]]:
    """Yields the kind and detail of findings that are no errors.

    Raises:
        NotAnImage: the image cannot be decoded, if `chunk.decode` is set.
    """
    if chunk.decode:
        decode(content, chunk.max_pixels)
        exif_orientation = orientation(content)
        if exif_orientation not in (None, 1):
            yield "exif", f"orientation {exif_orientation}"
    if head.format != "JPEG":
        yield "format", f"is a {head.format}" + (" named as a JPEG" if path.lower().endswith((".jpg", ".jpeg")) else "")
    if head.mode not in ("RGB", "L"):
        yield "color", f"color mode is {head.mode}"
    if min(head.width, head.height) < _SMALL_SIDE:
        yield "small", f"{head.width} x {head.height} pixels"
