"""Sources that are files: class folders, Kaggle's ImageNet, and data sets of this project."""

import os
from pathlib import Path

import pyarrow as pa

from pipeline.data.dataset import MANIFEST, open_index, read_manifest
from pipeline.data.folders import ImageFile, find_splits, list_classes, list_files, list_images
from pipeline.data.index import SCHEMA
from pipeline.data.tools.labels import DEVKIT, KAGGLE_CLASSES, KAGGLE_VAL, devkit_labels, kaggle_labels
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import Found, Scan, by_file_name, labelled
from pipeline.errors import DataError, listed

KAGGLE = Path("ILSVRC/Data/CLS-LOC")


def scan_prepared(root: Path, work: Path | None, pool: Pool) -> Scan:
    """A data set of this project, as source of another."""
    manifest = read_manifest(root)
    if manifest is None:
        raise DataError(f"{root} has no {MANIFEST}: it is not a data set of this project.")
    tables = {}
    for split in manifest.splits:
        table = open_index(root, manifest, split).table
        if manifest.layout == "folders":
            names = [path.partition("/")[2] for path in table["path"].to_pylist()]
            table = table.set_column(SCHEMA.get_field_index("name"), "name", pa.array(names, pa.string()))
        tables[split] = table
    return Scan("prepared", root, manifest.classes, tables)


def scan_folders(root: Path, work: Path | None, pool: Pool) -> Scan:
    """`train/CLASS/*`, and `val/CLASS/*` or flat `val/*` beside a list of what its pictures are."""
    train, val = find_splits(str(root), "train", "val")
    classes = list_classes(train)
    if _is_flat(val):
        pictures = [_found(image, Path()) for image in list_files(val, "val", 0)]
        val_table = by_file_name(pictures, _val_labels(root), classes)
    else:
        val_table = _class_folders(val, list_classes(val), classes)
    return Scan("folders", root, classes, {"train": _class_folders(train, classes, classes), "val": val_table})


def scan_kaggle(root: Path, work: Path | None, pool: Pool) -> Scan:
    """Kaggle's "ImageNet Object Localization Challenge": class folders for training, flat validation pictures."""
    missing = [name for name in (KAGGLE_VAL, KAGGLE_CLASSES) if not (root / name).is_file()]
    if missing:
        raise DataError(f"{root} lacks {', '.join(missing)}: Kaggle's archive holds them beside the folder ILSVRC.")
    train, val = root / KAGGLE / "train", root / KAGGLE / "val"
    if not (train.is_dir() and val.is_dir()):
        raise DataError(f"{root / KAGGLE} lacks train or val: unpack Kaggle's archive again.")
    lines = (root / KAGGLE_CLASSES).read_text(encoding="utf-8").splitlines()
    classes = tuple(sorted(line.split(maxsplit=1)[0] for line in lines if line.strip()))
    differ = sorted(set(list_classes(train)) ^ set(classes))
    if differ:
        raise DataError(
            f"{train} and {KAGGLE_CLASSES} do not name the same classes, they differ in {listed(differ)}: "
            f"was the archive unpacked to the end?"
        )
    pictures = [_found(image, KAGGLE) for image in list_files(val, "val", 0)]
    tables = {
        "train": _class_folders(train, classes, classes, KAGGLE),
        "val": by_file_name(pictures, kaggle_labels(root / KAGGLE_VAL), classes),
    }
    return Scan("kaggle", root, classes, tables)


def _class_folders(
    split: Path, classes: tuple[str, ...], train_classes: tuple[str, ...], below: Path = Path()
) -> pa.Table:
    images = list_images(split, classes, train_classes)
    return labelled([(image.label, _found(image, below)) for image in images], train_classes)


def _found(image: ImageFile, below: Path) -> Found:
    return Found(image.path, str(below / image.path), 0, image.length)


def _is_flat(folder: Path) -> bool:
    """Whether a split's folder holds files and no folders."""
    with os.scandir(folder) as entries:
        kinds = {entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    return kinds == {False}


def _val_labels(root: Path) -> dict[str, str]:
    if (root / KAGGLE_VAL).is_file():
        return kaggle_labels(root / KAGGLE_VAL)
    if (root / DEVKIT).is_file():
        return devkit_labels(root / DEVKIT)
    raise DataError(
        f"{root / 'val'} is flat: its pictures are in no class folders, and read as they are they would be one class. "
        f"Put {DEVKIT} or {KAGGLE_VAL} into {root}: they say what each picture is."
    )
