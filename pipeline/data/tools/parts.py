"""Parts of a preparation: shards, or groups of images in class folders, that any process can write.

A part's bytes are a function of its images and the options. Its record, the index of its images, is written last and
marks it as finished.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.files import Files
from pipeline.data.images import NotAnImage, check_size, decode, encode, header, ignore_pil_warnings, shrink, to_rgb
from pipeline.data.index import Shard
from pipeline.data.order import permutation
from pipeline.data.space import check_space
from pipeline.data.tables import load_table, save_table, table_of
from pipeline.data.tools import tars
from pipeline.data.tools.rows import Rows
from pipeline.errors import DataError
from pipeline.files import atomic_file
from pipeline.limits import MAX_PIXELS

WORK = ".prepare"  # working folder in the target
_FOLDER_PART_IMAGES = 1000
_ESTIMATE_IMAGES = 64  # encoded in advance to estimate the disk space that all images need
_TAR_BYTES_PER_SAMPLE = 3 * tars.BLOCK + tars.BLOCK // 2  # two headers, a label and half a block of padding


@dataclass(frozen=True)
class PrepareOptions:
    """Options that determine the written bytes.

    `shorter_side` (pixels) re-encodes every image with at most this shorter side; an image that would take more bytes
    is copied instead. `quality` is the JPEG quality of re-encoded images and of images converted from other formats.
    """

    to: Literal["shards", "folders"] = "shards"
    seed: int = 0
    shard_bytes: int = 128_000_000
    shorter_side: int | None = None
    quality: int = 95


@dataclass(frozen=True)
class Part:
    """One shard, or one group of images in class folders, of the images in `source`."""

    source: Path
    target: Path
    split: str
    number: int
    options: PrepareOptions
    skip_corrupt: bool
    max_pixels: int

    @property
    def label(self) -> str:
        """The part's name."""
        return f"{self.split}-{self.number:06d}"

    @property
    def shard(self) -> str:
        """The path of the shard below the target."""
        return f"{self.split}/{self.label}.tar"

    @property
    def record(self) -> Path:
        """The path of the part's index; a part is finished when this file exists."""
        return self.target / WORK / f"{self.label}.parquet"


@dataclass(frozen=True)
class PartResult:
    """The result of writing a part; the part is unfinished if images are corrupt and must not be skipped."""

    bytes: int
    sha256: str
    converted: int
    corrupt: list[str]


def is_finished(part: Part) -> bool:
    """Returns whether the part is complete; a part that is just being renamed is not."""
    if not part.record.is_file():
        return False
    result = read_record(part)
    if part.options.to == "folders":
        return True
    shard = part.target / part.shard
    return shard.is_file() and shard.stat().st_size == result.bytes


def read_record(part: Part) -> PartResult:
    """Reads the result of a finished part."""
    return PartResult(**json.loads(pq.read_schema(part.record).metadata[b"written"]))


def file_names(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns images' paths in class folders: the names in the source, with a JPEG extension."""
    is_jpeg = pc.match_substring_regex(names, r"\.jpe?g$", ignore_case=True)
    return pc.if_else(is_jpeg, names, pc.binary_join_element_wise(names, ".jpg", ""))


def divide(table: pa.Table, first: Part) -> list[tuple[Part, Rows]]:
    """Divides the images of a split into parts with the properties and numbers of `first` and its successors.

    Shards get the images in a shuffled order.
    """
    options, count = first.options, len(table)
    if options.to == "shards":
        rows_N = permutation(options.seed, 0, count)(np.arange(count))
        num_parts = max(1, -(-pc.sum(table["length"]).as_py() // options.shard_bytes))
    else:
        rows_N = np.arange(count)
        num_parts = -(-count // _FOLDER_PART_IMAGES)
    table = table.select(["path", "name", "offset", "length", "label"]).combine_chunks()
    bounds = [i * count // num_parts for i in range(num_parts + 1)]
    return [
        (replace(first, number=first.number + i), Rows(table, rows_N[start:stop]))
        for i, (start, stop) in enumerate(pairwise(bounds))
    ]


def check_disk_space(tasks: list[tuple[Part, Rows]]) -> None:
    """Raises `DataError` if the target lacks space for these parts."""
    if not tasks:
        return
    part, rows = tasks[0]
    size = sum(rows.bytes for _, rows in tasks)
    if part.options.shorter_side is not None:
        size = int(size * _estimate_compression(part, rows.table().slice(0, _ESTIMATE_IMAGES)))
    check_space(part.target, size + sum(len(rows) for _, rows in tasks) * _TAR_BYTES_PER_SAMPLE, "the images")


def _estimate_compression(part: Part, images: pa.Table) -> float:
    """Estimates bytes after / before re-encoding from a few images, plus 10 %."""
    before = after = 0
    with ignore_pil_warnings():
        for path, offset, length in zip(*(images[c].to_pylist() for c in ("path", "offset", "length")), strict=True):
            content = Files().open(part.source / path).read(offset, length)
            try:
                after += len(convert(content, part.options, part.max_pixels)[0])
                before += length
            except NotAnImage:
                continue
    return 1.1 * after / before if before else 1.0


def convert(content: bytes, options: PrepareOptions, max_pixels: int = MAX_PIXELS) -> tuple[bytes, int, int]:
    """Returns an image as stored, a gray or RGB JPEG, with its width and height in pixels.

    A gray or RGB JPEG that is not re-encoded is copied; only its header and end-of-image marker are checked.

    Raises:
        NotAnImage: the image is corrupt, of an unsupported format, or too large.
    """
    head = header(content, content)
    check_size(head.width, head.height, max_pixels)
    if head.plain_jpeg and options.shorter_side is None:
        return content, head.width, head.height
    image = to_rgb(decode(content, max_pixels))
    if options.shorter_side is not None:
        image = shrink(image, options.shorter_side)
    encoded = encode(image, options.quality)
    if head.plain_jpeg and image.size == (head.width, head.height) and len(encoded) >= len(content):
        return content, head.width, head.height
    return encoded, image.width, image.height


def write_part(task: tuple[Part, Rows]) -> PartResult:
    """Writes a part with the images in these rows of the scan; its record is written last and marks it as finished."""
    part, rows = task
    write = _write_shard if part.options.to == "shards" else _write_folder_part
    try:
        with ignore_pil_warnings():
            return write(part, rows.table())
    except OSError as error:
        raise DataError(
            f"{error.filename or part.target / part.shard}: {error.strerror or error}. Finished parts are kept."
        ) from error


def _converted_images(part: Part, images: pa.Table, corrupt: list[str]) -> Iterator[tuple[dict[str, Any], bytes, bool]]:
    """Yields (index row without its path, stored bytes, whether converted) per image; lists corrupt ones instead."""
    files = Files()
    columns = (images[name].to_pylist() for name in ("path", "name", "offset", "length", "label"))
    for path, name, offset, length, label in zip(*columns, strict=True):
        content = files.open(part.source / path).read(offset, length)
        try:
            if len(content) < length:
                raise NotAnImage("is truncated: the file has become shorter")
            stored, width, height = convert(content, part.options, part.max_pixels)
        except NotAnImage as error:
            corrupt.append(f"{name} in {part.source / path}: {error}")
            continue
        row = {
            "name": name,
            "length": len(stored),
            "label": label,
            "width": width,
            "height": height,
            "crc32": zlib.crc32(stored),
        }
        yield row, stored, stored is not content


def _temporary_file(part: Part) -> Path:
    """Returns the path that a file of a part is written to first; the next preparation removes leftovers."""
    return part.target / WORK / f"{part.label}.{os.getpid()}.tmp"


def _write_shard(part: Part, images: pa.Table) -> PartResult:
    """Writes a WebDataset shard: NUMBER.jpg and NUMBER.cls per sample, where NUMBER is its position in the split."""
    rows: list[dict[str, Any]] = []
    corrupt: list[str] = []
    converted = 0
    shard = part.target / part.shard
    temporary = _temporary_file(part)
    with temporary.open("wb") as raw_file:
        file = _HashingWriter(raw_file)
        for number, (row, stored, changed) in enumerate(_converted_images(part, images, corrupt)):
            key = f"{part.number:06d}{number:06d}"
            row |= {"path": part.shard, "offset": file.position + tars.BLOCK}
            tars.append_member(file, f"{key}.jpg", stored)
            tars.append_member(file, f"{key}.cls", str(row["label"]).encode())
            rows.append(row)
            converted += changed
        tars.write_end(file, file.position)
        raw_file.flush()
        os.fsync(raw_file.fileno())
    result = PartResult(file.position, file.digest.hexdigest(), converted, corrupt)
    if corrupt and not part.skip_corrupt:
        temporary.unlink()
    else:
        _save_record(part, rows, result)
        temporary.replace(shard)
    return result


class _HashingWriter:
    """A file written sequentially, with its SHA-256 and position."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest, self.position = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.position += len(content)
        return self._file.write(content)


def _write_folder_part(part: Part, images: pa.Table) -> PartResult:
    rows: list[dict[str, Any]] = []
    corrupt: list[str] = []
    converted = 0
    images = images.set_column(images.schema.get_field_index("name"), "name", file_names(images["name"]))
    for row, stored, changed in _converted_images(part, images, corrupt):
        row["path"] = f"{part.split}/{row.pop('name')}"
        file = part.target / row["path"]
        file.parent.mkdir(exist_ok=True)
        with atomic_file(file, _temporary_file(part)) as temporary:
            temporary.write_bytes(stored)
        rows.append(row)
        converted += changed
    result = PartResult(sum(row["length"] for row in rows), "", converted, corrupt)
    if part.skip_corrupt or not corrupt:
        _save_record(part, rows, result)
    return result


def _save_record(part: Part, rows: list[dict[str, Any]], result: PartResult) -> None:
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {"path": 0})}
    table = table_of(columns).replace_schema_metadata({"written": json.dumps(asdict(result))})
    save_table(table, part.record)


def join_records(parts: list[Part]) -> tuple[pa.Table, dict[str, Shard]]:
    """Returns the index of all images of the parts of a split, and the shards by path (none for class folders)."""
    tables = [load_table(part.record) for part in parts]
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks().replace_schema_metadata()
    results = {part.shard: read_record(part) for part in parts if part.options.to == "shards"}
    return table, {path: Shard(result.bytes, result.sha256) for path, result in results.items()}
