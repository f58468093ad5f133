"""Sources with images in flat or nested folders and labels in CSV files."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.data.files import File
from pipeline.data.formats import SIGNATURE_BYTES, detect_format
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.label_lists import IMAGE_COLUMNS, LABEL_COLUMNS, Row, find_label_lists, is_label_list, read_list
from pipeline.data.listing import Entry, Tree, joined, tree
from pipeline.data.names import SPLIT_WORDS, is_csv, words_of
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import (
    ImageLocation,
    Scan,
    find_split_folders,
    has_class_folders,
    is_flat,
    labeled_table,
)
from pipeline.data.tools.shard_samples import IMAGE_EXTENSIONS
from pipeline.errors import DataError, listed


class _ImageLookup:
    """Finds an image file by the name in a label list: path, path in the split or base name, extension optional.

    A name that several files share is ambiguous and finds none of them.
    """

    def __init__(self, files: dict[str, Entry], folder: str) -> None:
        self.files = files
        self._path_by_name: dict[str, str | None] = {}
        for path in files:
            in_split = path.removeprefix(f"{folder}/") if folder else path
            base = path.rpartition("/")[2]
            for name in dict.fromkeys((path, in_split, base, _stem(path), _stem(in_split), _stem(base))):
                self._path_by_name[name] = None if name in self._path_by_name else path
        for path in files:
            self._path_by_name[path] = path

    def find(self, row: Row) -> str | None:
        """Returns the path of a row's image, or None if it does not exist.

        Raises:
            DataError: several images have this name.
        """
        path = self._path_by_name.get(row.file, "")
        if path is None:
            raise DataError(
                f"{row.location}: several images are named {row.file}: give their paths relative to the data's folder."
            )
        return path or None


def is_list_source(root: Path) -> bool:
    """Returns whether CSV files in the folder list images and their labels."""
    train, val = find_split_folders(root)
    if has_class_folders(train) and is_flat(val):
        return False  # the CSV file labels the validation images only
    return any(is_label_list(file) for file in find_label_lists([f for f in (root, train, val) if f]))


def scan_lists(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Scans images with labels in CSV files; the split is given by the folders train and val or a column `split`."""
    train, val = find_split_folders(root)
    ignored = IgnoredFiles()
    lists = find_label_lists([folder for folder in (root, train, val) if folder])
    used = [file for file in lists if is_label_list(file)]
    for file in lists:
        if file not in used:
            ignored.add("lists without a column of images and one of labels", str(file.relative_to(root)))
    if not used:
        raise DataError(
            f"{root} has no label list: a CSV file with a column of image files ({', '.join(IMAGE_COLUMNS)}) and one "
            f"of labels ({', '.join(LABEL_COLUMNS)}); lists found: {listed([f.name for f in lists]) or 'none'}."
        )
    rows = {file: read_list(file) for file in used}
    rows_have_split = [row.split is not None for file_rows in rows.values() for row in file_rows]
    if all(rows_have_split):
        image_tree = _image_tree(root, "", ignored)
        lookups = dict.fromkeys(("train", "val"), _ImageLookup(image_tree.files, ""))
        problems = {"train": image_tree.problems}
    elif train is not None and val is not None:
        trees = {"train": _image_tree(train, train.name, ignored), "val": _image_tree(val, val.name, ignored)}
        lookups = {
            split: _ImageLookup(split_tree.files, folder.name)
            for (split, split_tree), folder in zip(trees.items(), (train, val), strict=True)
        }
        problems = {split: split_tree.problems for split, split_tree in trees.items()}
    else:
        raise DataError(
            f"{root} must have folders train and val, or {listed([f.name for f in used])} a column `split` with train "
            f"or val for each image."
        )
    labels = _labels(root, rows, lookups, ignored)
    labeled_paths = {path for split_labels in labels.values() for path in split_labels}
    _check_unlabeled(root, lookups.values(), labeled_paths, ignored)
    names = {label for split_labels in labels.values() for label in split_labels.values()}
    classes = tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))
    ranks = {name: rank for rank, name in enumerate(classes)}
    missing = sorted(names - set(labels["train"].values()))
    if missing:
        raise DataError(
            f"{root}: the training split has no image of the classes {listed(missing)}: add images or remove the "
            f"classes."
        )
    tables = {
        split: labeled_table(
            [
                (ranks[label], ImageLocation(path, path, 0, lookups[split].files[path].length))
                for path, label in split_labels.items()
            ],
            classes,
        )
        for split, split_labels in labels.items()
    }
    return Scan("list", root, classes, tables, problems, ignored)


def _image_tree(folder: Path, prefix: str, ignored: IgnoredFiles) -> Tree:
    """Returns all files in a folder at any depth except label lists, by path relative to the source's root."""
    found = tree(folder)
    ignored.merge(found.ignored)
    return Tree(
        {joined(prefix, path): entry for path, entry in found.files.items() if not is_csv(path)},
        {joined(prefix, path): problem for path, problem in found.problems.items()},
    )


def _labels(
    root: Path, rows: dict[Path, list[Row]], lookups: dict[str, _ImageLookup], ignored: IgnoredFiles
) -> dict[str, dict[str, str]]:
    """Returns the class of each image by split and path."""
    labels: dict[str, dict[str, str]] = {split: {} for split in lookups}
    row_by_path: dict[str, Row] = {}
    for file, file_rows in rows.items():
        words = words_of(str(file.relative_to(root)))
        splits = [split for split in lookups if words & SPLIT_WORDS[split]] or list(lookups)
        for row in file_rows:
            if row.split == "test":
                ignored.add("lines of a test split", row.location)
                continue
            matches = [
                (s, path) for s in splits if row.split in (None, s) and (path := lookups[s].find(row)) is not None
            ]
            if not matches:
                ignored.add("labels of images that do not exist", f"{row.file} ({row.location})")
            for split, path in matches:
                other = row_by_path.setdefault(path, row)
                if (other.label, other.split) != (row.label, row.split):
                    raise DataError(
                        f"{root / path}: {row.location} has label {_describe_label(row)}, {other.location} has "
                        f"{_describe_label(other)}."
                    )
                labels[split][path] = row.label
            if len(matches) > 1:
                paths = " and ".join(path for _, path in matches)
                raise DataError(
                    f"{root}: {row.location} matches both {paths}: name the split in the path or in a column `split`."
                )
    empty = [split for split, split_labels in labels.items() if not split_labels]
    if empty:
        raise DataError(
            f"{root}: {listed([f.name for f in rows])} lists no existing image of the split {' and '.join(empty)}."
        )
    return labels


def _describe_label(row: Row) -> str:
    return row.label if row.split is None else f"{row.label} in split {row.split}"


def _check_unlabeled(root: Path, lookups: Iterable[_ImageLookup], labeled: set[str], ignored: IgnoredFiles) -> None:
    """Raises `DataError` if images lack a label; counts test images and files that are not images in `ignored`."""
    unlabeled = []
    for path, entry in {path: entry for lookup in lookups for path, entry in lookup.files.items()}.items():
        if path in labeled:
            continue
        if not _is_image(path, entry):
            ignored.add("files that are not images", path)
        elif "test" in words_of(path.rpartition("/")[0]):
            ignored.add("images of a test split", path)
        else:
            unlabeled.append(path)
    if unlabeled:
        raise DataError(f"{root}: {len(unlabeled):,} images have no label: {listed(unlabeled)}. Label or remove them.")


def _is_image(path: str, entry: Entry) -> bool:
    if path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
        return True
    try:
        return detect_format(File(Path(entry.path)).read(0, SIGNATURE_BYTES), entry.length) is not None
    except OSError:
        return True  # an unreadable file is reported rather than ignored


def _stem(path: str) -> str:
    folder, slash, base = path.rpartition("/")
    return f"{folder}{slash}{base.rpartition('.')[0] or base}"
