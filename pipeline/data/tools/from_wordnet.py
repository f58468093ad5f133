"""Sources with one tar archive per WordNet id: ImageNet-21k, as `n*.tar` files or one archive of them."""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.ignored import IgnoredFiles
from pipeline.data.index import SCHEMA
from pipeline.data.listing import Entry, entries, member_ignore_reason
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
    """The n images of a class in the order of their names: `CLASS/FILE` (strings), offsets and lengths in bytes."""

    names: pa.Array
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
    scanned = pool.map(_scan, archives, "scanning", [archive.length for archive in archives])
    for _, ignored_members in scanned:
        ignored.merge(ignored_members)
    found = [(archive, images) for archive, (images, _) in zip(archives, scanned, strict=True) if len(images.names)]
    classes = tuple(archive.wnid for archive, _ in found)
    counts_K = [len(images.names) for _, images in found]
    files = list(dict.fromkeys(archive.path for archive, _ in found))
    numbers = {path: i for i, path in enumerate(files)}
    file_K = np.array([numbers[archive.path] for archive, _ in found], np.int32)
    columns = {
        "path": pa.DictionaryArray.from_arrays(np.repeat(file_K, counts_K), pa.array(files, pa.string())),
        "name": pa.concat_arrays([images.names for _, images in found] or [pa.array([], pa.string())]),
        "offset": np.concatenate([np.empty(0, np.int64), *(images.offsets_n for _, images in found)]),
        "length": np.concatenate([np.empty(0, np.int64), *(images.lengths_n for _, images in found)]),
        "label": np.repeat(np.arange(len(found), dtype=np.int32), counts_K),
    }
    rows = len(columns["label"])
    nulls = {field.name: pa.nulls(rows, field.type) for field in SCHEMA if field.name not in columns}
    return classes, pa.table(columns | nulls, schema=SCHEMA)


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
    images = ClassImages(
        pa.array([f"{archive.wnid}/{_base(member.name)}" for member in members], pa.string()),
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
