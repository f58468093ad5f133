"""A data set's folder: `dataset.json`, `index/SPLIT.parquet`, and the data in `SPLIT/` as shards or class folders.

`dataset.json` is written last, so that a folder that has one is complete.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.config import MAX_PIXELS
from pipeline.data.class_names import absent, doubts, refuse_one_class
from pipeline.data.folders import scan_split, scan_splits
from pipeline.data.images import TooLarge, check_size
from pipeline.data.index import DatasetIndex, Shard, load_table
from pipeline.errors import DataError, listed
from pipeline.files import write_text

MANIFEST = "dataset.json"
_FORMAT = 1


@dataclass(frozen=True)
class Split:
    """One split: its samples, their bytes, and its shards by path below the root (none for class folders)."""

    samples: int
    bytes: int
    shards: dict[str, Shard] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What `dataset.json` holds; `made` says from what and how, for people."""

    layout: Literal["shards", "folders"]
    classes: tuple[str, ...]
    splits: dict[str, Split]
    made: dict[str, Any]

    def save(self, root: Path) -> None:
        """Writes `dataset.json`."""
        write_text(root / MANIFEST, json.dumps({"format": _FORMAT} | asdict(self), indent=1) + "\n")


def parse_manifest(text: str, where: str) -> Manifest:
    """Reads the content of a `dataset.json`; `where` names it in errors.

    Raises:
        DataError: it is corrupt, or of another version.
    """
    try:
        content = json.loads(text)
        if content.pop("format") != _FORMAT:
            raise DataError(f"{where} is of another version of this project: make the data set or its index anew.")
        splits = {
            name: Split(split["samples"], split["bytes"], {p: Shard(**s) for p, s in split["shards"].items()})
            for name, split in content.pop("splits").items()
        }
        return Manifest(classes=tuple(content.pop("classes")), splits=splits, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is corrupt ({type(error).__name__}: {error}): make the data set anew.") from error


def read_manifest(root: Path) -> Manifest | None:
    """The folder's manifest; None where there is none."""
    file = root / MANIFEST
    try:
        return parse_manifest(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error


def index_file(root: Path, split: str) -> Path:
    """Where a prepared set keeps a split's index."""
    return root / "index" / f"{split}.parquet"


def open_index(root: Path, manifest: Manifest, split: str) -> DatasetIndex:
    """The index of a split of a data set's folder; its shards are not looked at.

    Raises:
        DataError: there is no such split, or its index is missing, corrupt or of other data.
    """
    if split not in manifest.splits:
        raise DataError(f"{root} has no split '{split}', it has {', '.join(manifest.splits)}: correct the name.")
    expected = manifest.splits[split]
    index = DatasetIndex(root.absolute(), manifest.classes, load_table(index_file(root, split)), expected.shards)
    if len(index) != expected.samples or index.total_bytes != expected.bytes:
        raise DataError(
            f"{index_file(root, split)} has {len(index)} samples, {root / MANIFEST} says {expected.samples}: "
            f"they are not of the same data set. Make the data set or its index anew."
        )
    return index


def check_shards(root: Path, split: Split) -> None:
    """Compares the shards' sizes with the manifest.

    Raises:
        DataError: shards are missing or of another size; some are named.
    """
    wrong = []
    for name, shard in split.shards.items():
        try:
            size = (root / name).stat().st_size
        except OSError as error:
            wrong.append(f"{name}: {error.strerror}")
            continue
        if size != shard.bytes:
            wrong.append(f"{name}: {size} bytes, indexed with {shard.bytes}")
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(split.shards)} shards in {root} are not those that were indexed:\n  "
            + listed(wrong, "\n  ")
            + "\nCopy or prepare them anew; `densenet data verify` compares everything."
        )


def check_sizes(index: DatasetIndex, max_pixels: int) -> None:
    """Compares all images' sizes in an index with the limit.

    Raises:
        DataError: some have more pixels; they are named.
    """
    large = []
    for sample in np.flatnonzero(index.widths_N * index.heights_N > max_pixels).tolist():
        try:
            check_size(int(index.widths_N[sample]), int(index.heights_N[sample]), max_pixels)
        except TooLarge as error:
            large.append(f"{index.describe(sample)} {error}")
    if large:
        raise DataError(
            f"{len(large)} of {len(index)} images in {index.root} are too large:\n  "
            + listed(large, "\n  ")
            + "\nRaise the limit, which costs memory, or leave them out."
        )


def open_split(root: Path, split: str, cache: Path, max_pixels: int = MAX_PIXELS) -> DatasetIndex:
    """The index of one split of a data set's folder, or of class folders without an index, remembered in `cache`.

    Raises:
        DataError: as `open_splits`.
    """
    manifest = read_manifest(root)
    if manifest is None:
        return scan_split(root, split, cache, max_pixels)
    index = open_index(root, manifest, split)
    check_sizes(index, max_pixels)
    check_shards(root, manifest.splits[split])
    return index


def open_splits(
    root: str | None,
    train: str,
    val: str,
    cache: Path,
    skip_corrupt: bool = False,
    warn: Callable[[str], None] = print,
    max_pixels: int = MAX_PIXELS,
) -> tuple[DatasetIndex, DatasetIndex]:
    """Indexes of the training and the evaluation split of a data set's folder, or of class folders without an index.

    The latter are looked at file by file, and remembered in the folder `cache`. With `skip_corrupt`, corrupt training
    files found there, and those of more than `max_pixels`, are left out and told to `warn`, as is what is allowed and
    probably not meant.

    Raises:
        DataError: something is missing, corrupt, or not laid out as it must be.
    """
    manifest = read_manifest(Path(root)) if root is not None else None
    if root is None or manifest is None:
        indexes = scan_splits(root, train, val, cache, skip_corrupt, warn, max_pixels)
    else:
        folder = Path(root)
        indexes = open_index(folder, manifest, train), open_index(folder, manifest, val)
        for name, index in zip((train, val), indexes, strict=True):
            check_sizes(index, max_pixels)
            check_shards(folder, manifest.splits[name])
    check_classes(*indexes, (train, val), str(root), warn)
    return indexes


def check_classes(
    train_index: DatasetIndex, val_index: DatasetIndex, names: tuple[str, str], root: str, warn: Callable[[str], None]
) -> None:
    """Looks at the classes of two splits that are trained on and evaluated; what is doubtful is told to `warn`.

    Raises:
        DataError: there is only one class.
    """
    refuse_one_class(train_index.classes, root)
    if names[0] == names[1]:
        warn(f"data.train and data.val are both '{names[0]}': the training images are evaluated")
    lines = [
        absent(index.classes, index.labels_N, name) for index, name in zip((train_index, val_index), names, strict=True)
    ]
    for line in [*doubts(train_index.classes), *filter(None, lines)]:
        warn(line)
