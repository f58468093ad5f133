"""What scanning a source of images gives, and what the scanners of several layouts share."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pipeline.data.class_names import check_known_classes, class_name_warnings, missing_class_warning
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.index import table_of
from pipeline.data.listing import Entry, entries, joined, tree
from pipeline.data.names import SPLIT_WORDS, is_compressed, words_of
from pipeline.errors import DataError, listed

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True)  # there are a million of them
class Found:
    """An image in a source: its name there, and where its bytes lie in the file `path` below the source's root."""

    name: str
    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class Scan:
    """A source's images: `splits` maps train and val to tables in the index's schema.

    Names are `CLASS/FILE`; widths, heights and checksums are null unless the source is a prepared data set, whose order
    is kept; else rows are sorted by label and name. `problems` tells by split what should be an image and cannot be
    read, by path and reason; `ignored` counts all else that the source holds and that is not taken.
    """

    layout: str
    root: Path
    classes: tuple[str, ...]
    splits: dict[str, pa.Table]
    problems: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)

    def notes(self) -> list[str]:
        """Lines on what is not taken, and on what is allowed and probably not meant."""
        lines = [
            missing_class_warning(self.classes, table["label"].to_numpy(), split)
            for split, table in self.splits.items()
        ]
        return (
            [f"left out: {line}" for line in self.ignored.lines()]
            + class_name_warnings(self.classes)
            + list(filter(None, lines))
        )


def labeled(images: Iterable[tuple[int, Found]], classes: tuple[str, ...]) -> pa.Table:
    """A split's table from images with their labels."""
    rows = sorted(images, key=lambda row: (row[0], row[1].name, row[1].path, row[1].offset))
    return table_of(
        {
            "path": [found.path for _, found in rows],
            "name": [f"{classes[label]}/{found.name.rpartition('/')[2]}" for label, found in rows],
            "offset": [found.offset for _, found in rows],
            "length": [found.length for _, found in rows],
            "label": [label for label, _ in rows],
        }
    )


def by_file_name(
    images: Iterable[Found], wnids: dict[str, str], classes: tuple[str, ...], ignored: IgnoredFiles
) -> pa.Table:
    """A flat validation split's table; `wnids` maps file names without their ending to classes.

    Labels without an image are counted in `ignored`.

    Raises:
        DataError: an image has no label, or one of a class that the training split lacks.
    """
    ranks = {wnid: rank for rank, wnid in enumerate(classes)}
    stems = [(found.name.rpartition("/")[2].rpartition(".")[0], found) for found in images]
    unlabeled = sorted(found.name for stem, found in stems if stem not in wnids)
    if unlabeled:
        raise DataError(f"{len(unlabeled)} validation images have no label: {listed(unlabeled)}.")
    check_known_classes("the validation split", sorted({wnids[stem] for stem, _ in stems}), classes)
    for stem in sorted(wnids.keys() - {stem for stem, _ in stems}):
        ignored.add("labels of validation images that are not there", stem)
    return labeled([(ranks[wnids[stem]], found) for stem, found in stems], classes)


def by_number(
    images: dict[str, list[tuple[int, Found]]], class_names: tuple[str, ...] | None, where: Path
) -> tuple[tuple[str, ...], dict[str, pa.Table]]:
    """Classes and tables of splits whose images carry numbers as labels.

    Where every image's name holds a WordNet id, and each number stands for one id, classes are the sorted ids, and
    labels their ranks, whatever the numbers were. Else the numbers are the labels, and `class_names` their names.

    Raises:
        DataError: numbers are negative or too large, or some have no training image.
    """
    numbers = {split: {number for number, _ in rows} for split, rows in images.items()}
    used = set.union(*numbers.values())
    if min(used) < 0:
        odd = [found.name for rows in images.values() for number, found in rows if number < 0]
        raise DataError(
            f"{where}: {len(odd)} images have negative labels, as test sets do ({listed(odd)}): leave them out."
        )
    lacking = sorted(used - numbers["train"])
    if lacking:
        raise DataError(f"{where}: no training image has the labels {listed([str(n) for n in lacking])}.")
    ids = _wordnet_ids(images)
    if ids is not None:
        classes = tuple(sorted(ids.values()))
        rank = {number: classes.index(wnid) for number, wnid in ids.items()}
    else:
        classes = class_names or tuple(str(number) for number in range(max(used) + 1))
        if max(used) >= len(classes):
            raise DataError(f"{where}: label {max(used)} is beyond the {len(classes)} class names.")
        rank = {number: number for number in used}
    tables = {
        split: labeled([(rank[number], found) for number, found in rows], classes) for split, rows in images.items()
    }
    return classes, tables


def _wordnet_ids(images: dict[str, list[tuple[int, Found]]]) -> dict[int, str] | None:
    """The WordNet id that each label stands for, by the training images' names; None unless that is one each."""
    ids: dict[int, str] = {}
    for number, found in images["train"]:
        match = _WNID.search(found.name)
        if match is None or ids.setdefault(number, match[0]) != match[0]:
            return None
    return ids if len(set(ids.values())) == len(ids) else None


def beside(folder: Path, taken: Collection[str], ignored: IgnoredFiles, prefix: str = "") -> None:
    """Counts what lies in a folder beside the names that are taken."""
    for entry in entries(folder, prefix, ignored):
        name = entry[0] if isinstance(entry, tuple) else entry.name
        if name not in taken:
            what = "folders" if isinstance(entry, Entry) and entry.is_folder else "files"
            ignored.add(f"{what} beside the data", joined(prefix, name))


def split_folders(root: Path) -> tuple[Path | None, Path | None]:
    """The folders of train and val in a source, whichever of `SPLIT_WORDS` they are called; None where there is none.

    Raises:
        DataError: several could be one.
    """
    found: list[Path | None] = []
    for split, names in SPLIT_WORDS.items():
        there = [split] if (root / split).is_dir() else sorted(name for name in names if (root / name).is_dir())
        if len(there) > 1:
            raise DataError(
                f"{root} has several folders for {split}, {listed(there)}: rename the one that is meant {split}."
            )
        found.append(root / there[0] if there else None)
    return found[0], found[1]


def has_class_folders(train: Path | None, least: int = 2) -> bool:
    """Whether there is a training split and folders in it, `least` or more; hidden ones do not count."""
    if train is None:
        return False
    return sum(isinstance(e, Entry) and e.is_folder for e in entries(train, "", IgnoredFiles())) >= least


def is_flat(split: Path | None) -> bool:
    """Whether there is a split's folder that holds files and no folders."""
    if split is None:
        return False
    return {e.is_folder for e in entries(split, "", IgnoredFiles()) if isinstance(e, Entry)} == {False}


def split_files(root: Path, ending: str, ignored: IgnoredFiles) -> dict[str, list[Path]]:
    """Files of train and val, told by words in their paths below `root`; all others are counted in `ignored`.

    Raises:
        DataError: a file's split is unclear, a split has no file, or something there is no file or cannot be listed.
    """
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    unclear = []
    found = tree(root)
    problems = [f"{path} {problem}" for path, problem in found.problems.items()]
    if problems:
        raise DataError(f"{root} holds what cannot be read: {listed(problems)}. Mend or remove it.")
    ignored.merge(found.ignored)
    for path in found.files:
        words = words_of(path)
        kinds = [split for split, names in SPLIT_WORDS.items() if words & names]
        if not path.endswith(f".{ending}"):
            ignored.add(f"files that are no .{ending} files", path)
        elif len(kinds) == 1:
            splits[kinds[0]].append(root / path)
        elif "test" in words:
            ignored.add("files of a test split", path)
        else:
            unclear.append(path)
    if unclear or not all(splits.values()):
        counts = ", ".join(f"{len(files)} of {split}" for split, files in splits.items())
        odd = f"; not told: {listed(unclear)}" if unclear else ""
        packed = [path for path in found.files if is_compressed(path)]
        first = f" Unpack {listed(packed)} first." if packed else ""
        raise DataError(
            f"{root}: the splits of .{ending} files are told by the words train, val or validation in their paths: "
            f"{counts}{odd}. Rename them.{first}"
        )
    return splits
