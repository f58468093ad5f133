"""The result of scanning an image source, and helpers that the layouts' scanners share."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pipeline.data.class_names import check_known_classes, class_name_warnings, missing_class_warning
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.listing import Entry, entries, joined, tree
from pipeline.data.names import SPLIT_WORDS, is_compressed, words_of
from pipeline.data.tables import class_counts, table_of
from pipeline.errors import DataError, listed

ILSVRC = "ILSVRC2012_"  # prefix of the names of all its archives
TRAIN_TAR, VAL_TAR = f"{ILSVRC}img_train.tar", f"{ILSVRC}img_val.tar"
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True)  # a source has a million of them
class ImageLocation:
    """Where an image's bytes are: `length` bytes at `offset` of the file `path`, relative to the source's root.

    `name` is the image's name in the source.
    """

    name: str
    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class Scan:
    """A source's images: `splits` maps train and val to tables in the index's schema; val may be missing.

    Names are `CLASS/FILE`. Rows are sorted by label and name, and widths, heights and checksums are null; only a
    prepared data set has them, and keeps its order. `problems` are unreadable files, by split and path, with the
    reason; `ignored` counts all other files that are not used.
    """

    layout: str
    root: Path
    classes: tuple[str, ...]
    splits: dict[str, pa.Table]
    problems: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)

    def notes(self) -> list[str]:
        """Returns lines on ignored files, doubtful class names and classes without images."""
        lines = [
            missing_class_warning(self.classes, class_counts(table, len(self.classes)), split)
            for split, table in self.splits.items()
        ]
        return (
            [f"ignored: {line}" for line in self.ignored.lines()]
            + class_name_warnings(self.classes)
            + list(filter(None, lines))
        )


def labeled_table(images: Iterable[tuple[int, ImageLocation]], classes: tuple[str, ...]) -> pa.Table:
    """Returns a split's table from images with their labels."""
    rows = sorted(images, key=lambda row: (row[0], row[1].name, row[1].path, row[1].offset))
    return table_of(
        {
            "path": [image.path for _, image in rows],
            "name": [f"{classes[label]}/{image.name.rpartition('/')[2]}" for label, image in rows],
            "offset": [image.offset for _, image in rows],
            "length": [image.length for _, image in rows],
            "label": [label for label, _ in rows],
        }
    )


def table_by_file_name(
    images: Iterable[ImageLocation], wnids: dict[str, str], classes: tuple[str, ...], ignored: IgnoredFiles
) -> pa.Table:
    """Returns a flat validation split's table; `wnids` maps file names without extension to classes.

    Labels without an image are counted in `ignored`.

    Raises:
        DataError: an image has no label, or a class that the training split lacks.
    """
    ranks = {wnid: rank for rank, wnid in enumerate(classes)}
    stems = [(image.name.rpartition("/")[2].rpartition(".")[0], image) for image in images]
    unlabeled = sorted(image.name for stem, image in stems if stem not in wnids)
    if unlabeled:
        raise DataError(f"{len(unlabeled)} validation images have no label: {listed(unlabeled)}.")
    check_known_classes("the validation split", sorted({wnids[stem] for stem, _ in stems}), classes)
    for stem in sorted(wnids.keys() - {stem for stem, _ in stems}):
        ignored.add("labels of validation images that do not exist", stem)
    return labeled_table([(ranks[wnids[stem]], image) for stem, image in stems], classes)


def tables_by_label_number(
    images: dict[str, list[tuple[int, ImageLocation]]], class_names: tuple[str, ...] | None, where: Path
) -> tuple[tuple[str, ...], dict[str, pa.Table]]:
    """Returns the classes and tables of splits whose labels are numbers, as `classes_by_label_number`."""
    numbers = {split: [(number, image.name) for number, image in rows] for split, rows in images.items()}
    classes, labels = classes_by_label_number(numbers, class_names, str(where))
    tables = {
        split: labeled_table([(labels[number], image) for number, image in rows], classes)
        for split, rows in images.items()
    }
    return classes, tables


def classes_by_label_number(
    images: dict[str, list[tuple[int, str]]], class_names: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], dict[int, int]]:
    """Returns the classes of splits whose labels are numbers, and each number's label; `images` has (number, name).

    If every training image's name has a WordNet id, and each number stands for one id, the classes are the sorted ids
    and the labels their ranks, whatever the numbers were. Otherwise the numbers are the labels, and `class_names` their
    names.

    Raises:
        DataError: numbers are negative or too large, or some have no training image.
    """
    numbers = {split: {number for number, _ in rows} for split, rows in images.items()}
    used = set.union(*numbers.values())
    if min(used) < 0:
        negative = [name for rows in images.values() for number, name in rows if number < 0]
        raise DataError(
            f"{where}: {len(negative)} images have negative labels, as test sets do ({listed(negative)}): exclude them."
        )
    missing = sorted(used - numbers["train"])
    if missing:
        raise DataError(f"{where}: no training image has the labels {listed([str(n) for n in missing])}.")
    ids = _wordnet_ids(images)
    if ids is not None:
        classes = tuple(sorted(ids.values()))
        return classes, {number: classes.index(wnid) for number, wnid in ids.items()}
    classes = class_names or tuple(str(number) for number in range(max(used) + 1))
    if max(used) >= len(classes):
        raise DataError(f"{where}: label {max(used)} is out of range: there are {len(classes)} class names.")
    return classes, {number: number for number in used}


def _wordnet_ids(images: dict[str, list[tuple[int, str]]]) -> dict[int, str] | None:
    """Returns the WordNet id of each label, from the training images' names; None unless they match one to one."""
    ids: dict[int, str] = {}
    for number, name in images["train"]:
        match = _WNID.search(name)
        if match is None or ids.setdefault(number, match[0]) != match[0]:
            return None
    return ids if len(set(ids.values())) == len(ids) else None


def count_other_entries(folder: Path, used: Collection[str], ignored: IgnoredFiles, prefix: str = "") -> None:
    """Counts a folder's entries other than the names in `used`."""
    for entry in entries(folder, prefix, ignored):
        name = entry[0] if isinstance(entry, tuple) else entry.name
        if name not in used:
            kind = "folders" if isinstance(entry, Entry) and entry.is_folder else "files"
            ignored.add(f"{kind} next to the data", joined(prefix, name))


def find_split_folders(root: Path) -> tuple[Path | None, Path | None]:
    """Returns the folders of train and val by any of their names in `SPLIT_WORDS`; None if there is none.

    Raises:
        DataError: several folders match a split.
    """
    folders: list[Path | None] = []
    for split, names in SPLIT_WORDS.items():
        existing = [split] if (root / split).is_dir() else sorted(name for name in names if (root / name).is_dir())
        if len(existing) > 1:
            raise DataError(
                f"{root} has several folders for {split}, {listed(existing)}: rename the intended one {split}."
            )
        folders.append(root / existing[0] if existing else None)
    return folders[0], folders[1]


def has_class_folders(train: Path | None, minimum: int = 2) -> bool:
    """Returns whether the training split exists and has at least `minimum` folders, hidden ones excluded."""
    if train is None:
        return False
    return sum(isinstance(e, Entry) and e.is_folder for e in entries(train, "", IgnoredFiles())) >= minimum


def is_flat(split: Path | None) -> bool:
    """Returns whether a split's folder exists and has files but no folders."""
    if split is None:
        return False
    return {e.is_folder for e in entries(split, "", IgnoredFiles()) if isinstance(e, Entry)} == {False}


def find_split_files(root: Path, extension: str, ignored: IgnoredFiles) -> dict[str, list[Path]]:
    """Returns the files of train and val by the words in their paths below `root`; counts others in `ignored`.

    There may be no files of val.

    Raises:
        DataError: a file's split is unclear, train has no file, or entries are not files or cannot be listed.
    """
    found = tree(root)
    problems = [f"{path} {problem}" for path, problem in found.problems.items()]
    if problems:
        raise DataError(f"{root} has unreadable entries: {listed(problems)}. Fix or remove them.")
    ignored.merge(found.ignored)
    splits = paths_by_split(found.files, extension, str(root), ignored)
    return {split: [root / path for path in paths] for split, paths in splits.items()}


def paths_by_split(paths: Collection[str], extension: str, where: str, ignored: IgnoredFiles) -> dict[str, list[str]]:
    """Returns the paths of train and val by the words in them; counts others in `ignored`. `where` is for errors.

    Raises:
        DataError: a file's split is unclear, or a split has no file.
    """
    splits: dict[str, list[str]] = {"train": [], "val": []}
    unclear = []
    for path in paths:
        words = words_of(path)
        matching = [split for split, names in SPLIT_WORDS.items() if words & names]
        if not path.endswith(f".{extension}"):
            ignored.add(f"files that are not .{extension} files", path)
        elif len(matching) == 1:
            splits[matching[0]].append(path)
        elif "test" in words:
            ignored.add("files of a test split", path)
        else:
            unclear.append(path)
    if unclear or not splits["train"]:
        counts = ", ".join(f"{len(files)} of {split}" for split, files in splits.items())
        unclear_files = f"; split unclear: {listed(unclear)}" if unclear else ""
        packed = [path for path in paths if is_compressed(path)]
        unpack = f" Unpack {listed(packed)} first." if packed else ""
        raise DataError(
            f"{where}: the words train, val or validation in the paths of .{extension} files name their split: "
            f"{counts}{unclear_files}. Rename them.{unpack}"
        )
    return {split: files for split, files in splits.items() if files}
