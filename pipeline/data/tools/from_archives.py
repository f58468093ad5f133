"""Sources that are tar archives, read where they lie: ILSVRC2012's own, and WebDataset shards."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.data.files import File
from pipeline.data.left_out import LeftOut
from pipeline.data.listing import member_reason
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
    labelled,
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
    left_out = LeftOut()
    beside(root, {TRAIN_TAR, VAL_TAR, DEVKIT}, left_out)
    archives = sorted(_kept(members(root / TRAIN_TAR), TRAIN_TAR, left_out), key=lambda member: member.name)
    odd = [member.name for member in archives if not re.fullmatch(r"n\d{8}\.tar", member.name)]
    if odd or not archives:
        raise DataError(f"{root / TRAIN_TAR} must hold an archive WNID.tar for each class; it holds {listed(odd)}.")
    classes = tuple(member.name.removesuffix(".tar") for member in archives)
    inside = pool.map(_in_class, [(root / TRAIN_TAR, archive) for archive in archives], "scanning")
    for _, odd_ones in inside:
        left_out.merge(odd_ones)
    empty = [name for name, (found, _) in zip(classes, inside, strict=True) if not found]
    if empty:
        raise DataError(f"{root / TRAIN_TAR} has class archives without pictures: {listed(empty)}.")
    train = [(label, found) for label, (pictures, _) in enumerate(inside) for found in pictures]
    val_members = _kept(members(root / VAL_TAR), VAL_TAR, left_out)
    val = [Found(member.name, VAL_TAR, member.offset, member.length) for member in val_members]
    tables = {
        "train": labelled(train, classes),
        "val": by_file_name(val, devkit_labels(root / DEVKIT), classes, left_out),
    }
    return Scan("ilsvrc", root, classes, tables, left_out=left_out)


def _in_class(place: tuple[Path, Member]) -> tuple[list[Found], LeftOut]:
    """The pictures of one class's archive inside the training archive."""
    path, archive = place
    where, left_out = f"{path}, {archive.name}", LeftOut()
    inside = _kept(members(path, archive.offset, archive.length, where), archive.name, left_out)
    return [Found(member.name, path.name, member.offset, member.length) for member in inside], left_out


def _kept(inside: Iterable[Member], where: str, left_out: LeftOut) -> Iterator[Member]:
    """The members that are not hidden."""
    for member in inside:
        reason = member_reason(member.name)
        if reason is None:
            yield member
        else:
            left_out.add(reason, f"{where}, {member.name}")


def scan_webdataset(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Tar shards whose samples are members of one stem: a picture, and its label in `.cls` or `.json`."""
    left_out = LeftOut()
    pictures: dict[str, list[tuple[int, Found]]] = {}
    for split, files in split_files(root, "tar", left_out).items():
        pictures[split] = []
        for rows, odd_ones in pool.map(_in_shard, [(root, file) for file in files], "scanning"):
            pictures[split] += rows
            left_out.merge(odd_ones)
    classes, tables = by_number(pictures, None, root)
    return Scan("webdataset", root, classes, tables, left_out=left_out)


def _in_shard(place: tuple[Path, Path]) -> tuple[list[tuple[int, Found]], LeftOut]:
    root, file = place
    path, left_out = str(file.relative_to(root)), LeftOut()
    found = samples(members(file), File(file).read, str(file), left_out)
    return [(label, Found(m.name, path, m.offset, m.length)) for label, m in found], left_out
