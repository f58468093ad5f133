"""Sources with one tar archive per WordNet id: ImageNet-21k, as `n*.tar` files or one archive of them."""

import re
from array import array
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.ignored import IgnoredFiles
from pipeline.data.listing import Entry, entries, member_ignore_reason
from pipeline.data.tables import SCHEMA
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import ILSVRC, Scan
from pipeline.data.tools.tars import Member, read_members
from pipeline.errors import DataError, listed

_CLASS_TAR = re.compile(r"n\d{8}\.tar")


@dataclass(frozen=True)
class ClassArchive:
    """The archive of a class: a part of the file `path` below `root`; `where` names it in messages."""

    root: Path
    path: str
    wnid: str
    offset: int
    length: int
    where: str


@dataclass(frozen=True)
class ClassImages:
    """The n images of a class in the order of their names; offsets and lengths in bytes.

    `names` has all names `CLASS/FILE` in UTF-8, one after the other, and `name_ends_n` the positions of their ends.
    """

    names: bytes
    name_ends_n: NDArray[np.int64]
    offsets_n: NDArray[np.int64]
    lengths_n: NDArray[np.int64]


def is_wordnet_source(root: Path) -> bool:
    """Returns whether a folder has class archives: `n*.tar` at the top or one level below, or one archive of them."""
    if any(_CLASS_TAR.fullmatch(file.name) for pattern in ("n*.tar", "*/n*.tar") for file in root.glob(pattern)):
        return True
    archives = [file for file in root.glob("*.tar") if file.is_file() and not file.name.startswith(ILSVRC)]
    try:
        return len(archives) == 1 and bool(_CLASS_TAR.fullmatch(_base(next(read_members(archives[0])).name)))
    except (DataError, OSError, StopIteration):
        return False


def scan_wordnet(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Scans class archives; there is no validation split."""
    ignored = IgnoredFiles()
    archives = _find_archives(root, ignored)
    if not archives:
        raise DataError(f"{root} has no archive WNID.tar, such as n01440764.tar, and no archive of such archives.")
    classes, table = scan_class_archives(archives, ignored, pool)
    empty = sorted({archive.wnid for archive in archives} - set(classes))
    for name in empty:
        ignored.add("class archives without images", f"{name}.tar")
    return Scan("wordnet-tars", root, classes, {"train": table}, ignored=ignored)


def scan_class_archives(
    archives: list[ClassArchive], ignored: IgnoredFiles, pool: Pool
) -> tuple[tuple[str, ...], pa.Table]:
    """Returns the classes that have images, and the table of all images, sorted by class and name.

    Raises:
        DataError: an archive cannot be read, or two are of the same class.
    """
    archives = sorted(archives, key=lambda archive: archive.wnid)
    for one, other in pairwise(archives):
        if one.wnid == other.wnid:
            raise DataError(f"{one.where} and {other.where} are archives of the same class: remove one.")
    columns = _Columns()
    for archive, (images, ignored_members) in zip(
        archives, pool.imap(_scan, archives, "scanning", [archive.length for archive in archives]), strict=True
    ):
        ignored.merge(ignored_members)
        columns.append(archive, images)
    return tuple(columns.classes), columns.table()


class _Columns:
    """The columns of a table with millions of rows: they grow in place, so that memory has them only once."""

    def __init__(self) -> None:
        self.classes: list[str] = []
        self._counts: list[int] = []
        self._files: dict[str, int] = {}
        self._file_of_class: list[int] = []
        self._names, self._name_ends = bytearray(), array("q", [0])
        self._offsets, self._lengths = array("q"), array("q")

    def append(self, archive: ClassArchive, images: ClassImages) -> None:
        """Appends the images of a class; skips an empty one."""
        if not len(images.offsets_n):
            return
        self.classes.append(archive.wnid)
        self._counts.append(len(images.offsets_n))
        self._file_of_class.append(self._files.setdefault(archive.path, len(self._files)))
        self._name_ends.frombytes((images.name_ends_n + len(self._names)).tobytes())
        self._names += images.names
        self._offsets.frombytes(images.offsets_n.tobytes())
        self._lengths.frombytes(images.lengths_n.tobytes())

    def table(self) -> pa.Table:
        """Returns the table; the columns share its memory."""
        rows = len(self._offsets)
        name = pa.Array.from_buffers(
            pa.large_string(), rows, [None, pa.py_buffer(self._name_ends), pa.py_buffer(self._names)]
        )
        files = pa.array(list(self._files), pa.string())
        columns = {
            "path": pa.DictionaryArray.from_arrays(
                np.repeat(np.array(self._file_of_class, np.int32), self._counts), files
            ),
            "name": name.cast(pa.string()),
            "offset": np.frombuffer(self._offsets, np.int64),
            "length": np.frombuffer(self._lengths, np.int64),
            "label": np.repeat(np.arange(len(self.classes), dtype=np.int32), self._counts),
        }
        nulls = {field.name: pa.nulls(rows, field.type) for field in SCHEMA if field.name not in columns}
        return pa.table(columns | nulls, schema=SCHEMA)


def _scan(archive: ClassArchive) -> tuple[ClassImages, IgnoredFiles]:
    """Reads the headers of one archive, without an object per image in the result."""
    ignored, members = IgnoredFiles(), []
    for member in read_members(archive.root / archive.path, archive.offset, archive.length, archive.where):
        reason = member_ignore_reason(member.name)
        if reason is None:
            members.append(member)
        else:
            ignored.add(reason, f"{archive.wnid}.tar, {member.name}")
    members.sort(key=lambda member: (member.name, member.offset))
    names = [f"{archive.wnid}/{_base(member.name)}".encode() for member in members]
    images = ClassImages(
        b"".join(names),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        np.array([member.offset for member in members], np.int64),
        np.array([member.length for member in members], np.int64),
    )
    return images, ignored


def _find_archives(root: Path, ignored: IgnoredFiles) -> list[ClassArchive]:
    """Finds the class archives at the top and one level below; counts other files in `ignored`."""
    archives: list[ClassArchive] = []
    problems: list[str] = []
    folders = []
    for entry in entries(root, "", ignored):
        if isinstance(entry, Entry) and entry.is_folder:
            folders.append(entry)
        elif isinstance(entry, Entry) and entry.name.endswith(".tar") and not _CLASS_TAR.fullmatch(entry.name):
            archives += inner_archives(root, entry.name, ignored)
        else:
            _add(root, entry, "", archives, problems, ignored)
    for folder in folders:
        for entry in entries(folder.path, folder.name, ignored):
            _add(root, entry, f"{folder.name}/", archives, problems, ignored)
    if problems:
        raise DataError(f"{root} has unreadable entries: {listed(problems)}. Fix or remove them.")
    return archives


def _add(
    root: Path,
    entry: Entry | tuple[str, str],
    prefix: str,
    archives: list[ClassArchive],
    problems: list[str],
    ignored: IgnoredFiles,
) -> None:
    if isinstance(entry, tuple):
        problems.append(f"{prefix}{entry[0]} {entry[1]}")
    elif _CLASS_TAR.fullmatch(entry.name) and not entry.is_folder:
        path = f"{prefix}{entry.name}"
        archives.append(ClassArchive(root, path, entry.name.removesuffix(".tar"), 0, entry.length, str(root / path)))
    else:
        ignored.add(f"{'folders' if entry.is_folder else 'files'} next to the data", f"{prefix}{entry.name}")


def inner_archives(root: Path, path: str, ignored: IgnoredFiles) -> list[ClassArchive]:
    """Returns the class archives in the archive `path` below `root`.

    Raises:
        DataError: it contains other files.
    """
    members: list[Member] = []
    for member in read_members(root / path):
        reason = member_ignore_reason(member.name)
        if reason is None:
            members.append(member)
        else:
            ignored.add(reason, f"{path}, {member.name}")
    unexpected = [member.name for member in members if not _CLASS_TAR.fullmatch(_base(member.name))]
    if unexpected or not members:
        raise DataError(
            f"{root / path} must contain one archive WNID.tar per class; it contains {listed(unexpected) or 'nothing'}."
        )
    return [
        ClassArchive(root, path, _base(m.name).removesuffix(".tar"), m.offset, m.length, f"{root / path}, {m.name}")
        for m in members
    ]


def _base(name: str) -> str:
    return name.rpartition("/")[2]
