"""Sources that are image files: class folders, Kaggle's ImageNet, and data sets of this project."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import split_paths
from pipeline.data.dataset import MANIFEST, open_index, read_manifest
from pipeline.data.folders import (
    ImageFile,
    Listing,
    list_classes,
    list_files,
    list_images,
)
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.label_lists import Row, find_label_lists, is_label_list, read_list
from pipeline.data.tables import SCHEMA, table_of
from pipeline.data.tools.imagenet_labels import DEVKIT, KAGGLE_CLASSES, KAGGLE_VAL, devkit_labels, kaggle_labels
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import (
    ImageLocation,
    Scan,
    count_other_entries,
    find_split_folders,
    is_flat,
    table_by_file_name,
)
from pipeline.errors import DataError, listed

KAGGLE = Path("ILSVRC/Data/CLS-LOC")
_LABEL_FILES = (DEVKIT, KAGGLE_VAL, KAGGLE_CLASSES)


def scan_prepared(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Scans a data set of this project, to prepare another one from it."""
    manifest = read_manifest(root)
    if manifest is None:
        raise DataError(f"{root} has no {MANIFEST}: it is not a data set of this project.")
    manifest.check_local(root)
    tables = {}
    for split in manifest.splits:
        table = open_index(root, manifest, split, check=True).to_table()
        if manifest.layout == "folders":
            files = split_paths(table["path"].cast(pa.string()))[1]
            classes = pa.array(manifest.classes, pa.string()).take(table["label"])
            names = pc.binary_join_element_wise(classes, files, "/")
            table = table.set_column(SCHEMA.get_field_index("name"), "name", names)
        tables[split] = table
    return Scan("prepared", root, manifest.classes, tables)


def scan_folders(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Scans class folders: `train/CLASS/*`, and `val/CLASS/*`, a flat `val/*` with a file of labels, or neither."""
    train, val = find_split_folders(root)
    if train is None:
        raise DataError(f"{root} has no folder train: it must contain train/CLASS/* and val/CLASS/*.")
    ignored = IgnoredFiles()
    count_other_entries(root, {folder.name for folder in (train, val) if folder} | set(_LABEL_FILES), ignored)
    folders = list_classes(train, ignored)
    classes = tuple(folders)
    train_listing = list_images(train, folders, classes)
    train_table = _table(train_listing, classes)
    if val is None:
        return _scan("folders", root, classes, {"train": (train_listing, train_table)}, ignored)
    if is_flat(val):
        val_listing = Listing()
        list_files(val, val.name, 0, val_listing)
        images = [_location(image, Path()) for image in val_listing.images()]
        val_table = table_by_file_name(images, _val_labels(root, val.name), classes, ignored)
    else:
        val_listing = list_images(val, list_classes(val, ignored), classes)
        val_table = _table(val_listing, classes)
    splits = {"train": (train_listing, train_table), "val": (val_listing, val_table)}
    return _scan("folders", root, classes, splits, ignored)


def _scan(
    layout: str,
    root: Path,
    classes: tuple[str, ...],
    splits: dict[str, tuple[Listing, pa.Table]],
    ignored: IgnoredFiles,
) -> Scan:
    for listing, _ in splits.values():
        ignored.merge(listing.ignored)
    problems = {split: listing.problems for split, (listing, _) in splits.items()}
    return Scan(layout, root, classes, {split: table for split, (_, table) in splits.items()}, problems, ignored)


def scan_kaggle(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Scans Kaggle's "ImageNet Object Localization Challenge": training class folders, flat validation images."""
    missing = [name for name in (KAGGLE_VAL, KAGGLE_CLASSES) if not (root / name).is_file()]
    if missing:
        raise DataError(f"{root} lacks {', '.join(missing)}: Kaggle's archive contains them next to the folder ILSVRC.")
    train, val = root / KAGGLE / "train", root / KAGGLE / "val"
    if not (train.is_dir() and val.is_dir()):
        raise DataError(f"{root / KAGGLE} lacks train or val: unpack Kaggle's archive again.")
    lines = (root / KAGGLE_CLASSES).read_text(encoding="utf-8").splitlines()
    classes = tuple(sorted(line.split(maxsplit=1)[0] for line in lines if line.strip()))
    ignored = IgnoredFiles()
    count_other_entries(root, {KAGGLE.parts[0], KAGGLE_VAL, KAGGLE_CLASSES}, ignored)
    count_other_entries(root / KAGGLE, {train.name, val.name}, ignored, str(KAGGLE))
    folders = list_classes(train, ignored)
    differing = sorted(set(folders) ^ set(classes))
    if differing:
        raise DataError(
            f"{train} and {KAGGLE_CLASSES} name different classes, they differ in {listed(differing)}: was the archive "
            f"unpacked completely?"
        )
    train_listing, val_listing = list_images(train, folders, classes), Listing()
    list_files(val, "val", 0, val_listing)
    images = [_location(image, KAGGLE) for image in val_listing.images()]
    val_table = table_by_file_name(images, kaggle_labels(root / KAGGLE_VAL), classes, ignored)
    train_table = _table(train_listing, classes, KAGGLE)
    splits = {"train": (train_listing, train_table), "val": (val_listing, val_table)}
    return _scan("kaggle", root, classes, splits, ignored)


def _table(listing: Listing, classes: tuple[str, ...], parent: Path = Path()) -> pa.Table:
    """Returns the table of class folders, which are listed in the order of classes and names."""
    paths, names, labels, lengths = [], [], [], []
    for part in listing.folders:
        files = part.names.cast(pa.string())
        paths.append(_prefixed((parent / part.folder).as_posix(), files))
        names.append(_prefixed(classes[part.label], files))
        labels.append(np.full(len(part), part.label, np.int32))
        lengths.append(part.lengths_F)
    path = pa.concat_arrays([pa.array([], pa.string()), *paths])
    return table_of(
        {
            "path": pa.DictionaryArray.from_arrays(np.arange(len(path), dtype=np.int32), path),
            "name": pa.chunked_array(names, pa.string()),
            "length": np.concatenate([np.empty(0, np.int64), *lengths]),
            "label": np.concatenate([np.empty(0, np.int32), *labels]),
        }
    )


def _prefixed(folder: str, files: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(folder, files, "/")


def _location(image: ImageFile, parent: Path) -> ImageLocation:
    return ImageLocation(image.path, str(parent / image.path), 0, image.length)


def _val_labels(root: Path, val: str) -> dict[str, str]:
    if (root / KAGGLE_VAL).is_file():
        return kaggle_labels(root / KAGGLE_VAL)
    if (root / DEVKIT).is_file():
        return devkit_labels(root / DEVKIT)
    lists = [file for file in find_label_lists([root, root / val]) if is_label_list(file)]
    if lists:
        return _labels_by_stem([row for file in lists for row in read_list(file)])
    raise DataError(
        f"{root / val} is flat: its images are not in class folders and, without labels, would be one class. Put "
        f"{DEVKIT} or {KAGGLE_VAL} into {root}, or a CSV file with the columns file and label, which give each image's "
        f"class."
    )


def _labels_by_stem(rows: list[Row]) -> dict[str, str]:
    row_by_stem: dict[str, Row] = {}
    for row in rows:
        if row.split in (None, "val"):
            base = row.file.rpartition("/")[2]
            other = row_by_stem.setdefault(base.rpartition(".")[0] or base, row)
            if other.label != row.label:
                raise DataError(
                    f"{row.file}: {row.location} has label {row.label}, {other.location} has {other.label}."
                )
    return {stem: row.label for stem, row in row_by_stem.items()}
