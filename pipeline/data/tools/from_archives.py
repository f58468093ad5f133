"""Sources that are tar archives, read without unpacking: ILSVRC2012's archives and WebDataset shards."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.data.files import File
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.listing import member_ignore_reason
from pipeline.data.tools.from_wordnet import inner_archives, scan_class_archives
from pipeline.data.tools.imagenet_labels import DEVKIT, devkit_labels
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import (
    TRAIN_TAR,
    VAL_TAR,
    ImageLocation,
    Scan,
    count_other_entries,
    find_split_files,
    table_by_file_name,
    tables_by_label_number,
)
from pipeline.data.tools.shard_samples import read_samples
from pipeline.data.tools.tars import Member, read_members
from pipeline.errors import DataError, listed


def scan_ilsvrc(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Scans ImageNet's original archives: a tar of 1,000 tars, a flat tar, and the development kit."""
    missing = [name for name in (TRAIN_TAR, VAL_TAR, DEVKIT) if not (root / name).is_file()]
    if missing:
        raise DataError(
            f"{root} lacks {', '.join(missing)}: {TRAIN_TAR}, {VAL_TAR} and {DEVKIT} must be in one folder."
        )
    ignored = IgnoredFiles()
    count_other_entries(root, {TRAIN_TAR, VAL_TAR, DEVKIT}, ignored)
    archives = inner_archives(root, TRAIN_TAR, ignored)
    classes, train = scan_class_archives(archives, ignored, pool)
    empty = sorted({archive.wnid for archive in archives} - set(classes))
    if empty:
        raise DataError(f"{root / TRAIN_TAR} has class archives without images: {listed(empty)}.")
    val_members = _visible(read_members(root / VAL_TAR), VAL_TAR, ignored)
    val = [ImageLocation(member.name, VAL_TAR, member.offset, member.length) for member in val_members]
    tables = {
        "train": train,
        "val": table_by_file_name(val, devkit_labels(root / DEVKIT), classes, ignored),
    }
    return Scan("ilsvrc", root, classes, tables, ignored=ignored)


def _visible(members: Iterable[Member], where: str, ignored: IgnoredFiles) -> Iterator[Member]:
    """Yields the members that are not hidden, and counts the others in `ignored`."""
    for member in members:
        reason = member_ignore_reason(member.name)
        if reason is None:
            yield member
        else:
            ignored.add(reason, f"{where}, {member.name}")


def scan_webdataset(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Scans WebDataset shards: the members of a sample share a key, an image and its label in `.cls` or `.json`."""
    ignored = IgnoredFiles()
    images: dict[str, list[tuple[int, ImageLocation]]] = {}
    for split, files in find_split_files(root, "tar", ignored).items():
        images[split] = []
        for rows, ignored_members in pool.map(_scan_shard, [(root, file) for file in files], "scanning"):
            images[split] += rows
            ignored.merge(ignored_members)
    classes, tables = tables_by_label_number(images, None, root)
    return Scan("webdataset", root, classes, tables, ignored=ignored)


def _scan_shard(task: tuple[Path, Path]) -> tuple[list[tuple[int, ImageLocation]], IgnoredFiles]:
    root, file = task
    path, ignored = str(file.relative_to(root)), IgnoredFiles()
    samples = read_samples(read_members(file), File(file).read, str(file), ignored)
    return [(label, ImageLocation(m.name, path, m.offset, m.length)) for label, m in samples], ignored
