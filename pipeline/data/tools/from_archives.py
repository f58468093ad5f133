"""Pretrained that are tar archives, read where they lie: ILSVRC2012's own, and WebDataset shards."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.data.files import File
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.listing import member_ignore_reason
from pipeline.data.tools.labels import DEVKIT, devkit_labels
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.samples import samples
from pipeline.data.tools.scan import (
    TRAIN_TAR,
    VAL_TAR,
    Found,
    Scan,
    beside,
    by_file_name,
    by_number,
    labeled,
    split_files,
)
from pipeline.data.tools.tars import Member, members
from pipeline.errors import DataError, listed


def scan_ilsvrc(root: Path, work: Path | None, pool: Pool) -> Scan:
    """The archives as ImageNet gives them out: a tar of 1,000 tars, a flat tar, and the development kit."""
    missing = [name for name in (TRAIN_TAR, VAL_TAR, DEVKIT) if not (root / name).is_file()]
    if missing:
        raise DataError(
            f"{root} lacks {', '.join(missing)}: {TRAIN_TAR}, {VAL_TAR} and {DEVKIT} must be in one folder."
        )
    ignored = IgnoredFiles()
    beside(root, {TRAIN_TAR, VAL_TAR, DEVKIT}, ignored)
    archives = sorted(_kept(members(root / TRAIN_TAR), TRAIN_TAR, ignored), key=lambda member: member.name)
    odd = [member.name for member in archives if not re.fullmatch(r"n\d{8}\.tar", member.name)]
    if odd or not archives:
        raise DataError(f"{root / TRAIN_TAR} must hold an archive WNID.tar for each class; it holds {listed(odd)}.")
    classes = tuple(member.name.removesuffix(".tar") for member in archives)
    inside = pool.map(_in_class, [(root / TRAIN_TAR, archive) for archive in archives], "scanning")
    for _, odd_ones in inside:
        ignored.merge(odd_ones)
    empty = [name for name, (found, _) in zip(classes, inside, strict=True) if not found]
    if empty:
        raise DataError(f"{root / TRAIN_TAR} has class archives without images: {listed(empty)}.")
    train = [(label, found) for label, (images, _) in enumerate(inside) for found in images]
    val_members = _kept(members(root / VAL_TAR), VAL_TAR, ignored)
    val = [Found(member.name, VAL_TAR, member.offset, member.length) for member in val_members]
    tables = {
        "train": labeled(train, classes),
        "val": by_file_name(val, devkit_labels(root / DEVKIT), classes, ignored),
    }
    return Scan("ilsvrc", root, classes, tables, ignored=ignored)


def _in_class(place: tuple[Path, Member]) -> tuple[list[Found], IgnoredFiles]:
    """The images of one class's archive inside the training archive."""
    path, archive = place
    where, ignored = f"{path}, {archive.name}", IgnoredFiles()
    inside = _kept(members(path, archive.offset, archive.length, where), archive.name, ignored)
    return [Found(member.name, path.name, member.offset, member.length) for member in inside], ignored


def _kept(inside: Iterable[Member], where: str, ignored: IgnoredFiles) -> Iterator[Member]:
    """The members that are not hidden."""
    for member in inside:
        reason = member_ignore_reason(member.name)
        if reason is None:
            yield member
        else:
            ignored.add(reason, f"{where}, {member.name}")


def scan_webdataset(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Tar shards whose samples are members of one stem: an image, and its label in `.cls` or `.json`."""
    ignored = IgnoredFiles()
    images: dict[str, list[tuple[int, Found]]] = {}
    for split, files in split_files(root, "tar", ignored).items():
        images[split] = []
        for rows, odd_ones in pool.map(_in_shard, [(root, file) for file in files], "scanning"):
            images[split] += rows
            ignored.merge(odd_ones)
    classes, tables = by_number(images, None, root)
    return Scan("webdataset", root, classes, tables, ignored=ignored)


def _in_shard(place: tuple[Path, Path]) -> tuple[list[tuple[int, Found]], IgnoredFiles]:
    root, file = place
    path, ignored = str(file.relative_to(root)), IgnoredFiles()
    found = samples(members(file), File(file).read, str(file), ignored)
    return [(label, Found(m.name, path, m.offset, m.length)) for label, m in found], ignored
