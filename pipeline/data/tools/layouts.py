"""Pretrained of images, recognized by looking at what lies there."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.dataset import MANIFEST
from pipeline.data.label_lists import find_label_lists
from pipeline.data.names import is_compressed
from pipeline.data.tools.from_archives import scan_ilsvrc, scan_webdataset
from pipeline.data.tools.from_folders import KAGGLE, scan_folders, scan_kaggle, scan_prepared
from pipeline.data.tools.from_lists import is_list_source, scan_lists
from pipeline.data.tools.from_parquet import scan_parquet
from pipeline.data.tools.labels import DEVKIT, KAGGLE_CLASSES, KAGGLE_VAL
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import TRAIN_TAR, VAL_TAR, Scan, has_class_folders, split_folders
from pipeline.errors import DataError, listed

_ILSVRC = "ILSVRC2012_"  # begins the names of all its archives


@dataclass(frozen=True)
class Layout:
    """A kind of source: what it looks like, whether a folder is one, and how it is scanned.

    `scan` takes the source, a working folder (None where nothing may be written) and a pool. From what it returns,
    images are read at their places, in any order, by any process.
    """

    name: str
    looks_like: str
    is_here: Callable[[Path], bool]
    scan: Callable[[Path, Path | None, Pool], Scan]


def recognize(root: Path, override: str | None = None) -> Layout:
    """Tells a source's layout; `override` names one instead.

    Raises:
        DataError: there is no such folder, nothing is recognized, or several layouts are.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the one that holds the archives, shards or class folders.")
    if override is not None:
        named = [layout for layout in LAYOUTS if layout.name == override]
        if not named:
            raise DataError(f"layout '{override}' is not known: use {', '.join(layout.name for layout in LAYOUTS)}.")
        return named[0]
    found = [layout for layout in LAYOUTS if layout.is_here(root)]
    if found and (len(found) == 1 or found[0].name == "prepared"):
        return found[0]
    if found:
        names = " and like ".join(layout.name for layout in found)
        raise DataError(f"{root} looks like {names}: choose one with --layout.")
    hints = "".join(f" {hint}" for hint in _hints(root))
    known = "\n".join(f"  {layout.name:11} {layout.looks_like}" for layout in LAYOUTS)
    there = listed(sorted(os.listdir(root))) or "nothing"
    raise DataError(f"{root} is in no layout that is known; in it: {there}.{hints} Known are:\n{known}")


def _hints(root: Path) -> Iterator[str]:
    """What may be meant by a folder that is in no layout."""
    packed = [name for name in sorted(os.listdir(root)) if is_compressed(name)]
    if packed:
        yield f"Unpack {listed(packed)} first."
    train, val = split_folders(root)
    if train is not None and val is None:
        yield "There is no validation split: move a share of each class's images from train to val."
    lists = [file.name for file in find_label_lists([root])]
    if lists:
        yield f"{listed(lists)}: a list needs a column of images, called `file`, and one of labels, called `label`."


def _holds(ending: str, root: Path) -> bool:
    folders = [root, root / "data", *filter(None, split_folders(root))]
    return any(not f.name.startswith(_ILSVRC) for folder in folders for f in folder.glob(f"*.{ending}"))


def _has_class_folders(root: Path) -> bool:
    train, val = split_folders(root)
    return val is not None and has_class_folders(train, least=2 if is_list_source(root) else 1)


LAYOUTS = (
    Layout(
        "prepared",
        f"a data set of this project: {MANIFEST}",
        lambda root: (root / MANIFEST).is_file(),
        scan_prepared,
    ),
    Layout(
        "ilsvrc",
        f"{TRAIN_TAR}, {VAL_TAR} and {DEVKIT}",
        lambda root: (root / TRAIN_TAR).is_file() or (root / VAL_TAR).is_file(),
        scan_ilsvrc,
    ),
    Layout(
        "kaggle",
        f"{KAGGLE}, {KAGGLE_VAL} and {KAGGLE_CLASSES}",
        lambda root: (root / KAGGLE).is_dir(),
        scan_kaggle,
    ),
    Layout(
        "parquet",
        "*train*.parquet and *val*.parquet with an image and a label in each row",
        lambda root: _holds("parquet", root),
        scan_parquet,
    ),
    Layout(
        "webdataset",
        "*train*.tar and *val*.tar with NAME.jpg and NAME.cls or NAME.json",
        lambda root: _holds("tar", root),
        scan_webdataset,
    ),
    Layout(
        "folders",
        f"train/CLASS/*, and val/CLASS/* or flat val/* beside {DEVKIT} or {KAGGLE_VAL}",
        _has_class_folders,
        scan_folders,
    ),
    Layout(
        "list",
        "train/* and val/* at any depth, with *.csv that name each image and its label, and perhaps its split",
        is_list_source,
        scan_lists,
    ),
)
