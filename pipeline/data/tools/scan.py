"""What scanning a source of pictures gives, and what the scanners of several layouts share."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pipeline.data.class_names import absent, doubts, unknown_classes
from pipeline.data.index import table_of
from pipeline.data.left_out import LeftOut
from pipeline.data.listing import Entry, entries, joined, tree
from pipeline.data.names import SPLIT_WORDS, is_packed, words_of
from pipeline.errors import DataError, listed

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True)  # there are a million of them
class Found:
    """A picture in a source: its name there, and where its bytes lie in the file `path` below the source's root."""

    name: str
    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class Scan:
    """A source's pictures: `splits` maps train and val to tables in the index's schema.

    Names are `CLASS/FILE`; widths, heights and checksums are null unless the source is a prepared data set, whose order
    is kept; else rows are sorted by label and name. `faults` tells by split what should be an image and cannot be
    read, by path and reason; `left_out` counts all else that the source holds and that is not taken.
    """

    layout: str
    root: Path
    classes: tuple[str, ...]
    splits: dict[str, pa.Table]
    faults: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)

    def notes(self) -> list[str]:
        """Lines on what is not taken, and on what is allowed and probably not meant."""
        lines = [absent(self.classes, table["label"].to_numpy(), split) for split, table in self.splits.items()]
        return (
            [f"left out: {line}" for line in self.left_out.lines()] + doubts(self.classes) + list(filter(None, lines))
        )


def labelled(pictures: Iterable[tuple[int, Found]], classes: tuple[str, ...]) -> pa.Table:
    """A split's table from pictures with their labels."""
    rows = sorted(pictures, key=lambda row: (row[0], row[1].name, row[1].path, row[1].offset))
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
    pictures: Iterable[Found], wnids: dict[str, str], classes: tuple[str, ...], left_out: LeftOut
) -> pa.Table:
    """A flat validation split's table; `wnids` maps file names without their ending to classes.

    Labels without an image are counted in `left_out`.

    Raises:
        DataError: a picture has no label, or one of a class that the training split lacks.
    """
    ranks = {wnid: rank for rank, wnid in enumerate(classes)}
    stems = [(found.name.rpartition("/")[2].rpartition(".")[0], found) for found in pictures]
    unlabelled = sorted(found.name for stem, found in stems if stem not in wnids)
    if unlabelled:
        raise DataError(f"{len(unlabelled)} validation pictures have no label: {listed(unlabelled)}.")
    unknown_classes("the validation split", sorted({wnids[stem] for stem, _ in stems}), classes)
    for stem in sorted(wnids.keys() - {stem for stem, _ in stems}):
        left_out.add("labels of validation images that are not there", stem)
    return labelled([(ranks[wnids[stem]], found) for stem, found in stems], classes)


def by_number(
    pictures: dict[str, list[tuple[int, Found]]], class_names: tuple[str, ...] | None, where: Path
) -> tuple[tuple[str, ...], dict[str, pa.Table]]:
    """Classes and tables of splits whose pictures carry numbers as labels.

    Where every picture's name holds a WordNet id, and each number stands for one id, classes are the sorted ids, and
    labels their ranks, whatever the numbers were. Else the numbers are the labels, and `class_names` their names.

    Raises:
        DataError: numbers are negative or too large, or some have no training picture.
    """
    numbers = {split: {number for number, _ in rows} for split, rows in pictures.items()}
    used = set.union(*numbers.values())
    if min(used) < 0:
        odd = [found.name for rows in pictures.values() for number, found in rows if number < 0]
        raise DataError(
            f"{where}: {len(odd)} pictures have negative labels, as test sets do ({listed(odd)}): leave them out."
        )
    lacking = sorted(used - numbers["train"])
    if lacking:
        raise DataError(f"{where}: no training picture has the labels {listed([str(n) for n in lacking])}.")
    ids = _wordnet_ids(pictures)
    if ids is not None:
        classes = tuple(sorted(ids.values()))
        rank = {number: classes.index(wnid) for number, wnid in ids.items()}
    else:
        classes = class_names or tuple(str(number) for number in range(max(used) + 1))
        if max(used) >= len(classes):
            raise DataError(f"{where}: label {max(used)} is beyond the {len(classes)} class names.")
        rank = {number: number for number in used}
    tables = {
        split: labelled([(rank[number], found) for number, found in rows], classes) for split, rows in pictures.items()
    }
    return classes, tables


def _wordnet_ids(pictures: dict[str, list[tuple[int, Found]]]) -> dict[int, str] | None:
    """The WordNet id that each label stands for, by the training pictures' names; None unless that is one each."""
    ids: dict[int, str] = {}
    for number, found in pictures["train"]:
        match = _WNID.search(found.name)
        if match is None or ids.setdefault(number, match[0]) != match[0]:
            return None
    return ids if len(set(ids.values())) == len(ids) else None


def beside(folder: Path, taken: Collection[str], left_out: LeftOut, prefix: str = "") -> None:
    """Counts what lies in a folder beside the names that are taken."""
    for entry in entries(folder, prefix, left_out):
        name = entry[0] if isinstance(entry, tuple) else entry.name
        if name not in taken:
            what = "folders" if isinstance(entry, Entry) and entry.is_folder else "files"
            left_out.add(f"{what} beside the data", joined(prefix, name))


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
    return sum(isinstance(e, Entry) and e.is_folder for e in entries(train, "", LeftOut())) >= least


def is_flat(split: Path | None) -> bool:
    """Whether there is a split's folder that holds files and no folders."""
    if split is None:
        return False
    return {e.is_folder for e in entries(split, "", LeftOut()) if isinstance(e, Entry)} == {False}


def split_files(root: Path, ending: str, left_out: LeftOut) -> dict[str, list[Path]]:
    """Files of train and val, told by words in their paths below `root`; all others are counted in `left_out`.

    Raises:
        DataError: a file's split is unclear, a split has no file, or something there is no file or cannot be listed.
    """
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    unclear = []
    found = tree(root)
    faults = [f"{path} {fault}" for path, fault in found.faults.items()]
    if faults:
        raise DataError(f"{root} holds what cannot be read: {listed(faults)}. Mend or remove it.")
    left_out.merge(found.left_out)
    for path in found.files:
        words = words_of(path)
        kinds = [split for split, names in SPLIT_WORDS.items() if words & names]
        if not path.endswith(f".{ending}"):
            left_out.add(f"files that are no .{ending} files", path)
        elif len(kinds) == 1:
            splits[kinds[0]].append(root / path)
        elif "test" in words:
            left_out.add("files of a test split", path)
        else:
            unclear.append(path)
    if unclear or not all(splits.values()):
        counts = ", ".join(f"{len(files)} of {split}" for split, files in splits.items())
        odd = f"; not told: {listed(unclear)}" if unclear else ""
        packed = [path for path in found.files if is_packed(path)]
        first = f" Unpack {listed(packed)} first." if packed else ""
        raise DataError(
            f"{root}: the splits of .{ending} files are told by the words train, val or validation in their paths: "
            f"{counts}{odd}. Rename them.{first}"
        )
    return splits
