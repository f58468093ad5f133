"""Layouts of image sources, detected from the files in a folder."""

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
from pipeline.data.tools.from_wordnet import is_wordnet_source, scan_wordnet
from pipeline.data.tools.imagenet_labels import DEVKIT, KAGGLE_CLASSES, KAGGLE_VAL
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.scan import ILSVRC, TRAIN_TAR, VAL_TAR, Scan, find_split_folders, has_class_folders
from pipeline.errors import DataError, listed


@dataclass(frozen=True)
class Layout:
    """A source layout: its description, a check whether a folder has it, and its scanner.

    `scan` takes the source, a working folder (None if nothing may be written) and a process pool. Its result locates
    every image, so that any process can read images in any order.
    """

    name: str
    description: str
    matches: Callable[[Path], bool]
    scan: Callable[[Path, Path | None, Pool], Scan]


def detect_layout(root: Path, name: str | None = None) -> Layout:
    """Returns a source's layout, detected from its files or given by `name`.

    Raises:
        DataError: the folder does not exist, or matches no layout or several.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder with the archives, shards or class folders.")
    if name is not None:
        named = [layout for layout in LAYOUTS if layout.name == name]
        if not named:
            raise DataError(f"layout '{name}' is unknown: use {', '.join(layout.name for layout in LAYOUTS)}.")
        return named[0]
    matching = [layout for layout in LAYOUTS if layout.matches(root)]
    if matching and (len(matching) == 1 or matching[0].name == "prepared"):
        return matching[0]
    if matching:
        names = " and ".join(layout.name for layout in matching)
        raise DataError(f"{root} matches several layouts, {names}: choose one with --layout.")
    hints = "".join(f" {hint}" for hint in _hints(root))
    supported = "\n".join(f"  {layout.name:12} {layout.description}" for layout in LAYOUTS)
    content = listed(sorted(os.listdir(root))) or "nothing"
    raise DataError(f"{root} has no known layout; it contains: {content}.{hints} Supported layouts:\n{supported}")


def _hints(root: Path) -> Iterator[str]:
    """Yields advice for a folder without a known layout."""
    packed = [name for name in sorted(os.listdir(root)) if is_compressed(name)]
    if packed:
        yield f"Unpack {listed(packed)} first."
    lists = [file.name for file in find_label_lists([root])]
    if lists:
        yield f"{listed(lists)}: a label list needs a column of images, `file`, and a column of labels, `label`."


def _has_files(extension: str, root: Path) -> bool:
    folders = [root, root / "data", *filter(None, find_split_folders(root))]
    return any(not f.name.startswith(ILSVRC) for folder in folders for f in folder.glob(f"*.{extension}"))


def _has_class_folders(root: Path) -> bool:
    train, val = find_split_folders(root)
    if val is None:
        return has_class_folders(train, minimum=1) and not is_list_source(root)
    return has_class_folders(train, minimum=2 if is_list_source(root) else 1)


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
        lambda root: _has_files("parquet", root),
        scan_parquet,
    ),
    Layout(
        "webdataset",
        "*train*.tar and *val*.tar with NAME.jpg and NAME.cls or NAME.json",
        lambda root: _has_files("tar", root) and not is_wordnet_source(root),
        scan_webdataset,
    ),
    Layout(
        "wordnet-tars",
        "n01440764.tar ..., one archive per WordNet id (ImageNet-21k), or one archive of them",
        is_wordnet_source,
        scan_wordnet,
    ),
    Layout(
        "folders",
        f"train/CLASS/*, and val/CLASS/* or flat val/* with {DEVKIT} or {KAGGLE_VAL}",
        _has_class_folders,
        scan_folders,
    ),
    Layout(
        "list",
        "train/* and val/* at any depth, with *.csv that list each image, its label and optionally its split",
        is_list_source,
        scan_lists,
    ),
)
