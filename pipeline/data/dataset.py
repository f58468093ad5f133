"""A data set: `dataset.json`, `index/SPLIT.arrow`, and the data next to them or at an address that `dataset.json` has.

`dataset.json` is written last, so a folder with this file is complete.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.data.class_names import class_name_warnings, missing_class_warning, require_two_classes
from pipeline.data.class_subset import with_classes
from pipeline.data.columns import columns_of
from pipeline.data.folder_index import scan_split, scan_splits
from pipeline.data.images import TooLarge, check_size
from pipeline.data.index import DatasetIndex, Shard
from pipeline.data.index_file import save_index
from pipeline.data.tables import load_table
from pipeline.errors import DataError, listed
from pipeline.files import write_text
from pipeline.limits import MAX_PIXELS

MANIFEST = "dataset.json"
_FORMAT = 2
_PARQUET_FORMAT = 1  # of data sets whose indexes are Parquet files, which are read into memory


@dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        samples: Number of samples.
        bytes: Of all its encoded images.
        index: Path of its index below the root.
        shards: Shards by path below the root; none for class folders.
    """

    samples: int
    bytes: int
    index: str
    shards: dict[str, Shard] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The content of `dataset.json`; `made` describes source and options for people.

    The shards are in the data set's folder, or below `address`, a folder or URI.
    """

    layout: Literal["shards", "folders"]
    classes: tuple[str, ...]
    splits: dict[str, Split]
    made: dict[str, Any]
    address: str | None = None

    def check_local(self, root: Path) -> None:
        """Raises `DataError` if the shards are not in the data set's folder `root`."""
        if self.address is not None:
            raise DataError(
                f"{root} has only the index of the shards at {self.address}, which were checked when they were "
                f"indexed. Training reads them there, through data.stage; for this, copy them to a folder and use that."
            )

    def save(self, root: Path) -> None:
        """Writes `dataset.json`."""
        content = {"format": _FORMAT} | asdict(self)
        if self.address is None:
            del content["address"]
        write_text(root / MANIFEST, json.dumps(content, indent=1) + "\n")


def parse_manifest(text: str, where: str) -> Manifest:
    """Parses the content of a `dataset.json`; `where` names it in errors.

    Raises:
        DataError: it is corrupt, or has another format version.
    """
    try:
        content = json.loads(text)
        version = content.pop("format")
        if version not in (_FORMAT, _PARQUET_FORMAT):
            raise DataError(
                f"{where} was written by another version of this project: create the data set or its index again."
            )
        splits = {
            name: Split(
                split["samples"],
                split["bytes"],
                split["index"] if version == _FORMAT else f"index/{name}.parquet",
                {path: Shard(shard["bytes"], shard["sha256"]) for path, shard in split["shards"].items()},
            )
            for name, split in content.pop("splits").items()
        }
        return Manifest(classes=tuple(content.pop("classes")), splits=splits, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is corrupt ({type(error).__name__}: {error}): create the data set again.") from error


def read_manifest(root: Path) -> Manifest | None:
    """Reads a folder's manifest; returns None if there is none."""
    file = root / MANIFEST
    try:
        return parse_manifest(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error


def index_file(root: Path, split: str) -> Path:
    """Returns the path of the index of a split in a new data set."""
    return root / "index" / f"{split}.arrow"


def save_split(
    root: Path, split: str, table: pa.Table, classes: tuple[str, ...], shards: dict[str, Shard] | None = None
) -> Split:
    """Writes a split's index from a table in `pipeline.data.tables.SCHEMA`; returns its entry in `dataset.json`."""
    file = index_file(root, split)
    file.parent.mkdir(exist_ok=True)
    summary = save_index(columns_of(table), classes, file)
    return Split(len(table), summary.bytes, file.relative_to(root).as_posix(), shards or {})


def open_index(root: Path, manifest: Manifest, split: str, check: bool | None = None) -> DatasetIndex:
    """Opens the index of a split of a prepared data set; does not check its shards.

    `check` compares all its columns with their checksums; by default, those of files up to 256 MB.

    Raises:
        DataError: there is no such split, or its index is missing, corrupt or belongs to other data.
    """
    if split not in manifest.splits:
        raise DataError(f"{root} has no split '{split}', it has {', '.join(manifest.splits)}: correct the name.")
    expected = manifest.splits[split]
    file = root.absolute() / expected.index
    if file.suffix == ".parquet":
        index = DatasetIndex.of_table(root.absolute(), manifest.classes, load_table(file), expected.shards)
    else:
        index = DatasetIndex.open(root.absolute(), file, expected.shards, address=manifest.address, check=check)
    if (len(index), index.total_bytes, index.classes) != (expected.samples, expected.bytes, manifest.classes):
        raise DataError(
            f"{file} has {len(index)} samples, {root / MANIFEST} has {expected.samples}: "
            f"they belong to different data sets. Create the data set or its index again."
        )
    return index


def check_shards(root: Path, manifest: Manifest, split: str) -> None:
    """Compares the sizes of a split's shards with the manifest, unless they are at another address.

    Raises:
        DataError: shards are missing or have another size; the message names the first few.
    """
    problems, shards = [], manifest.splits[split].shards if manifest.address is None else {}
    for name, shard in shards.items():
        try:
            size = os.stat(f"{root}/{name}").st_size
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if size != shard.bytes:
            problems.append(f"{name}: {size} bytes, {shard.bytes} in the index")
    if problems:
        raise DataError(
            f"{len(problems)} of {len(shards)} shards in {root} are not those that were indexed:\n  "
            + listed(problems, "\n  ")
            + "\nCopy or prepare them again; `densenet data verify` checks everything."
        )


def check_sizes(index: DatasetIndex, max_pixels: int) -> None:
    """Checks all images' sizes in an index against the limit.

    Raises:
        DataError: some have more pixels; the message names the first few.
    """
    if index.summary.largest_pixels <= max_pixels:
        return
    large = []
    for sample in np.flatnonzero(index.widths_N.astype(np.int64) * index.heights_N > max_pixels).tolist():
        try:
            check_size(int(index.widths_N[sample]), int(index.heights_N[sample]), max_pixels)
        except TooLarge as error:
            large.append(f"{index.describe(sample)} {error}")
    if large:
        raise DataError(
            f"{len(large)} of {len(index)} images in {index.root} are too large:\n  "
            + listed(large, "\n  ")
            + "\nRaise the limit, which costs memory, or remove them."
        )


def open_split(
    root: Path, split: str, cache: Path, max_pixels: int = MAX_PIXELS, classes: Path | None = None
) -> DatasetIndex:
    """Opens one split of a prepared data set, or indexes class folders; caches that index in `cache`.

    `classes` is a list of classes to choose or merge (`pipeline.data.class_subset`).

    Raises:
        DataError: as `open_splits`.
    """
    manifest = read_manifest(root)
    if manifest is None:
        index = scan_split(root, split, cache, max_pixels)
    else:
        manifest.check_local(root)
        index = open_index(root, manifest, split)
        check_sizes(index, max_pixels)
        check_shards(root, manifest, split)
    return index if classes is None else with_classes(index, classes, cache)


def open_splits(
    root: str | None,
    train: str,
    val: str,
    cache: Path,
    skip_corrupt: bool = False,
    warn: Callable[[str], None] = print,
    max_pixels: int = MAX_PIXELS,
    classes: Path | None = None,
) -> tuple[DatasetIndex, DatasetIndex]:
    """Opens the training and the evaluation split of a prepared data set, or indexes class folders.

    Checks class folders file by file, and caches the index in the folder `cache`. With `skip_corrupt`, skips training
    files in class folders that are corrupt or have more than `max_pixels`. Passes skipped files and suspicious data to
    `warn`. `classes` is a list of classes to choose or merge (`pipeline.data.class_subset`).

    Raises:
        DataError: something is missing, corrupt, or has the wrong layout.
    """
    manifest = read_manifest(Path(root)) if root is not None else None
    if root is None or manifest is None:
        indexes = scan_splits(root, train, val, cache, skip_corrupt, warn, max_pixels)
    else:
        folder = Path(root)
        indexes = open_index(folder, manifest, train), open_index(folder, manifest, val)
        for name, index in zip((train, val), indexes, strict=True):
            check_sizes(index, max_pixels)
            check_shards(folder, manifest, name)
    if classes is not None:
        indexes = with_classes(indexes[0], classes, cache), with_classes(indexes[1], classes, cache)
    check_classes(*indexes, (train, val), str(root), warn)
    return indexes


def check_classes(
    train_index: DatasetIndex, val_index: DatasetIndex, names: tuple[str, str], root: str, warn: Callable[[str], None]
) -> None:
    """Checks the classes of the training and the evaluation split; passes suspicious ones to `warn`.

    Raises:
        DataError: there is only one class.
    """
    require_two_classes(train_index.classes, root)
    if names[0] == names[1]:
        warn(f"data.train and data.val are both '{names[0]}': the training images are evaluated")
    lines = [
        missing_class_warning(index.classes, index.summary.counts_K, name)
        for index, name in zip((train_index, val_index), names, strict=True)
    ]
    for line in [*class_name_warnings(train_index.classes), *filter(None, lines)]:
        warn(line)
