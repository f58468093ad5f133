"""Sources that are tar archives, read where they lie: ILSVRC2012's own, and WebDataset shards."""

import json
import re
from pathlib import Path

from pipeline.data.tools.labels import DEVKIT, devkit_labels
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import TRAIN_TAR, VAL_TAR, Found, Scan, by_file_name, by_number, labelled, split_files
from pipeline.data.tools.tars import Member, members
from pipeline.errors import DataError, listed

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")


def scan_ilsvrc(root: Path, work: Path | None, pool: Pool) -> Scan:
    """The archives as ImageNet gives them out: a tar of 1,000 tars, a flat tar, and the development kit."""
    missing = [name for name in (TRAIN_TAR, VAL_TAR, DEVKIT) if not (root / name).is_file()]
    if missing:
        raise DataError(
            f"{root} lacks {', '.join(missing)}: {TRAIN_TAR}, {VAL_TAR} and {DEVKIT} must be in one folder."
        )
    archives = sorted(members(root / TRAIN_TAR), key=lambda member: member.name)
    odd = [member.name for member in archives if not re.fullmatch(r"n\d{8}\.tar", member.name)]
    if odd or not archives:
        raise DataError(f"{root / TRAIN_TAR} must hold an archive WNID.tar for each class; it holds {listed(odd)}.")
    classes = tuple(member.name.removesuffix(".tar") for member in archives)
    inside = pool.map(_in_class, [(root / TRAIN_TAR, archive) for archive in archives], "scanning")
    empty = [name for name, found in zip(classes, inside, strict=True) if not found]
    if empty:
        raise DataError(f"{root / TRAIN_TAR} has class archives without pictures: {listed(empty)}.")
    train = [(label, found) for label, pictures in enumerate(inside) for found in pictures]
    val = [Found(member.name, VAL_TAR, member.offset, member.length) for member in members(root / VAL_TAR)]
    tables = {
        "train": labelled(train, classes),
        "val": by_file_name(val, devkit_labels(root / DEVKIT), classes),
    }
    return Scan("ilsvrc", root, classes, tables)


def _in_class(place: tuple[Path, Member]) -> list[Found]:
    """The pictures of one class's archive inside the training archive."""
    path, archive = place
    inside = members(path, archive.offset, archive.length, f"{path}, {archive.name}")
    return [Found(member.name, path.name, member.offset, member.length) for member in inside]


def scan_webdataset(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Tar shards whose samples are members of one stem: a picture, and its label in `.cls` or `.json`."""
    files = split_files(root, "tar")
    pictures = {
        split: [row for rows in pool.map(_in_shard, [(root, file) for file in of_split], "scanning") for row in rows]
        for split, of_split in files.items()
    }
    classes, tables = by_number(pictures, None, root)
    return Scan("webdataset", root, classes, tables)


def _in_shard(place: tuple[Path, Path]) -> list[tuple[int, Found]]:
    root, file = place
    pictures: dict[str, Member] = {}
    labels: dict[str, int] = {}
    with file.open("rb") as stream:
        for member in members(file):
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            key, ending = f"{folder}/{stem}", ending.lower()
            if ending in PICTURES:
                other = pictures.setdefault(key, member)
                if other is not member:
                    raise DataError(f"{file}: a sample has two pictures, {other.name} and {member.name}.")
            elif ending in ("cls", "json"):
                stream.seek(member.offset)
                label = label_in(ending, stream.read(member.length), f"{file}, {member.name}")
                if label is not None and labels.setdefault(key, label) != label:
                    raise DataError(f"{file}: {member.name} gives label {label}, another member gave {labels[key]}.")
    without = [member.name for key, member in pictures.items() if key not in labels]
    if without:
        raise DataError(f"{file}: {len(without)} pictures have no label in a .cls or .json: {listed(without)}.")
    path = str(file.relative_to(root))
    return [(labels[key], Found(m.name, path, m.offset, m.length)) for key, m in pictures.items()]


def label_in(ending: str, content: bytes, where: str) -> int | None:
    """The label in a `.cls` member, or under `label` or `cls` in a `.json` one; None if the latter has none.

    Raises:
        DataError: it is not a whole number.
    """
    try:
        if ending == "cls":
            return int(content)
        fields = json.loads(content)
        value = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
        return None if value is None else int(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: the label must be a whole number, it is {content[:40]!r}.") from error
