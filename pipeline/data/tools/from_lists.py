"""Pretrained whose images lie flat or at any depth, with their labels in CSV files beside."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.data.files import File
from pipeline.data.formats import SIGNATURE_BYTES, detect_format
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.label_lists import IMAGE_COLUMNS, LABEL_COLUMNS, Row, find_label_lists, is_label_list, read_list
from pipeline.data.listing import Entry, Tree, joined, tree
from pipeline.data.names import SPLIT_WORDS, is_csv, words_of
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.samples import IMAGE_ENDINGS
from pipeline.data.tools.scan import Found, Scan, has_class_folders, is_flat, labeled, split_folders
from pipeline.errors import DataError, listed


class _Images:
    """Image files by the names that a list may have for them: path, path in the split, base name, each with or
    without its ending.

    A name that several files share leads to none of them.
    """

    def __init__(self, files: dict[str, Entry], folder: str) -> None:
        self.files = files
        self._by_name: dict[str, str | None] = {}
        for path in files:
            below = path.removeprefix(f"{folder}/") if folder else path
            base = path.rpartition("/")[2]
            for name in dict.fromkeys((path, below, base, _stem(path), _stem(below), _stem(base))):
                self._by_name[name] = None if name in self._by_name else path
        for path in files:
            self._by_name[path] = path

    def find(self, row: Row) -> str | None:
        """The path of a row's image; None where it is not here.

        Raises:
            DataError: several are called so.
        """
        path = self._by_name.get(row.file, "")
        if path is None:
            raise DataError(
                f"{row.location}: several images are called {row.file}: give their paths below the data's folder."
            )
        return path or None


def is_list_source(root: Path) -> bool:
    """Whether labels are in CSV files: there are some that name images and labels."""
    train, val = split_folders(root)
    if has_class_folders(train) and is_flat(val):
        return False  # the list is of the validation images alone
    return any(is_label_list(file) for file in find_label_lists([f for f in (root, train, val) if f]))


def scan_lists(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Images of train and val in folders of these names, or told by a column `split`, and lists of their labels."""
    train, val = split_folders(root)
    ignored = IgnoredFiles()
    lists = find_label_lists([folder for folder in (root, train, val) if folder])
    used = [file for file in lists if is_label_list(file)]
    for file in lists:
        if file not in used:
            ignored.add("lists without a column of images and one of labels", str(file.relative_to(root)))
    if not used:
        raise DataError(
            f"{root} has no list of labels: a CSV file with a column of image files ({', '.join(IMAGE_COLUMNS)}) and "
            f"one of labels ({', '.join(LABEL_COLUMNS)}); there is {listed([f.name for f in lists]) or 'none'}."
        )
    rows = {file: read_list(file) for file in used}
    of_splits = [row.split is not None for of_file in rows.values() for row in of_file]
    if all(of_splits):
        found = _below(root, "", ignored)
        pools = dict.fromkeys(("train", "val"), _Images(found.files, ""))
        problems = {"train": found.problems}
    elif train is not None and val is not None:
        trees = {"train": _below(train, train.name, ignored), "val": _below(val, val.name, ignored)}
        pools = {
            split: _Images(there.files, folder.name)
            for (split, there), folder in zip(trees.items(), (train, val), strict=True)
        }
        problems = {split: there.problems for split, there in trees.items()}
    else:
        raise DataError(
            f"{root} must hold folders train and val, or {listed([f.name for f in used])} a column `split` with train "
            f"or val for each image."
        )
    labels = _labels(root, rows, pools, ignored)
    _refuse_unlabeled(root, pools.values(), {path for of_split in labels.values() for path in of_split}, ignored)
    names = {label for of_split in labels.values() for label in of_split.values()}
    classes = tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))
    ranks = {name: rank for rank, name in enumerate(classes)}
    lacking = sorted(names - set(labels["train"].values()))
    if lacking:
        raise DataError(
            f"{root}: no training image is of the classes {listed(lacking)}: add some or remove the others."
        )
    tables = {
        split: labeled(
            [(ranks[label], Found(path, path, 0, pools[split].files[path].length)) for path, label in of_split.items()],
            classes,
        )
        for split, of_split in labels.items()
    }
    return Scan("list", root, classes, tables, problems, ignored)


def _below(folder: Path, prefix: str, ignored: IgnoredFiles) -> Tree:
    """All files below a folder but lists, by path below the source's root."""
    found = tree(folder)
    ignored.merge(found.ignored)
    return Tree(
        {joined(prefix, path): entry for path, entry in found.files.items() if not is_csv(path)},
        {joined(prefix, path): problem for path, problem in found.problems.items()},
    )


def _labels(
    root: Path, rows: dict[Path, list[Row]], pools: dict[str, _Images], ignored: IgnoredFiles
) -> dict[str, dict[str, str]]:
    """Each split's images with their classes, by path."""
    labels: dict[str, dict[str, str]] = {split: {} for split in pools}
    told: dict[str, Row] = {}
    for file, of_file in rows.items():
        words = words_of(str(file.relative_to(root)))
        splits = [split for split in pools if words & SPLIT_WORDS[split]] or list(pools)
        for row in of_file:
            if row.split == "test":
                ignored.add("lines of a test split", row.location)
                continue
            places = [(s, path) for s in splits if row.split in (None, s) and (path := pools[s].find(row)) is not None]
            if not places:
                ignored.add("labels of images that are not there", f"{row.file} ({row.location})")
            for split, path in places:
                other = told.setdefault(path, row)
                if (other.label, other.split) != (row.label, row.split):
                    raise DataError(
                        f"{root / path}: {row.location} says {_says(row)}, {other.location} says {_says(other)}."
                    )
                labels[split][path] = row.label
            if len(places) > 1:
                paths = " and ".join(path for _, path in places)
                raise DataError(
                    f"{root}: {row.location} can mean {paths}: name the split in the path or in a column `split`."
                )
    empty = [split for split, of_split in labels.items() if not of_split]
    if empty:
        raise DataError(
            f"{root}: {listed([f.name for f in rows])} names no image of {' and '.join(empty)} that is there."
        )
    return labels


def _says(row: Row) -> str:
    return row.label if row.split is None else f"{row.label} of {row.split}"


def _refuse_unlabeled(root: Path, pools: Iterable[_Images], taken: set[str], ignored: IgnoredFiles) -> None:
    """Images without a label are an error, but for those of a test split; files that are none are left out."""
    without = []
    for path, entry in {path: entry for pool in pools for path, entry in pool.files.items()}.items():
        if path in taken:
            continue
        if not _is_image(path, entry):
            ignored.add("files that are no images", path)
        elif "test" in words_of(path.rpartition("/")[0]):
            ignored.add("images of a test split", path)
        else:
            without.append(path)
    if without:
        raise DataError(f"{root}: {len(without):,} images have no label: {listed(without)}. Label or remove them.")


def _is_image(path: str, entry: Entry) -> bool:
    if path.rpartition(".")[2].lower() in IMAGE_ENDINGS:
        return True
    try:
        return detect_format(File(Path(entry.path)).read(0, SIGNATURE_BYTES), entry.length) is not None
    except OSError:
        return True  # it cannot be told: better named than left out


def _stem(path: str) -> str:
    folder, slash, base = path.rpartition("/")
    return f"{folder}{slash}{base.rpartition('.')[0] or base}"
