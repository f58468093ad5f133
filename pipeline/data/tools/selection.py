"""Chooses what is used of a scanned source: listed classes, classes with enough images, and a validation split."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.class_list import read_class_list, relabel
from pipeline.data.tools.scan import Scan
from pipeline.errors import DataError, listed

_HASH_ROWS = 1 << 16  # rows whose names are in memory as text at a time


@dataclass(frozen=True)
class Selection:
    """What is used of a source.

    `classes` is a class list (see `pipeline.data.class_list`). Classes with fewer training images than `min_images` are
    dropped. `val_per_class` images of each class become the validation split of a source without one: those with the
    smallest hashes of name and `seed`.
    """

    classes: Path | None = None
    min_images: int = 0
    val_per_class: int = 0
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns what differs from using everything, for `dataset.json`."""
        chosen: dict[str, Any] = {}
        if self.classes is not None:
            chosen["classes"] = self.classes.name
        if self.min_images:
            chosen["min_images"] = self.min_images
        if self.val_per_class:
            chosen |= {"val_per_class": self.val_per_class, "seed": self.seed}
        return chosen


EVERYTHING = Selection()


def select(scan: Scan, selection: Selection) -> Scan:
    """Returns a scan of the selected images, with train and val; counts dropped classes as ignored.

    The tables of `scan` are removed from it column by column, because two of them would take gigabytes of memory.

    Raises:
        DataError: there is no validation split and `val_per_class` is not set, or there are both; no class remains, or
            one has no training image left; the list of classes is invalid.
    """
    _check_val(scan, selection)
    if not selection.to_json():
        return scan
    classes, labels_K = scan.classes, np.arange(len(scan.classes), dtype=np.int32)
    if selection.classes is not None:
        classes, labels_K = relabel(read_class_list(selection.classes, scan.classes), scan.classes)
        _count(scan, "classes that are not in the list", [scan.classes[k] for k in np.flatnonzero(labels_K < 0)])
    labels_N = labels_K[scan.splits["train"]["label"].to_numpy()]
    counts_K = np.bincount(labels_N[labels_N >= 0], minlength=len(classes))
    large_K = counts_K >= selection.min_images
    if not large_K.any():
        raise DataError(
            f"{scan.root} has no class with {selection.min_images:,} training images, the largest has "
            f"{counts_K.max(initial=0):,}: lower --min-images."
        )
    small = [classes[k] for k in np.flatnonzero(~large_K)]
    _count(scan, f"classes with fewer than {selection.min_images:,} training images", small)
    labels_K = np.append(np.where(large_K, np.cumsum(large_K) - 1, -1), -1).astype(np.int32)[labels_K]
    classes = tuple(name for name, large in zip(classes, large_K, strict=True) if large)
    renamed = any(label >= 0 and classes[label] != scan.classes[k] for k, label in enumerate(labels_K))
    labels_N = labels_K[scan.splits["train"]["label"].to_numpy()]
    splits = {"train": np.flatnonzero(labels_N >= 0)}
    tables = {}
    if selection.val_per_class:
        _check_counts(classes, np.bincount(labels_N[splits["train"]], minlength=len(classes)), selection.val_per_class)
        is_val_N = _choose(scan.splits["train"], labels_N, selection)
        splits = {"train": np.flatnonzero((labels_N >= 0) & ~is_val_N), "val": np.flatnonzero(is_val_N)}
        scan.splits["val"] = scan.splits["train"]
    else:
        splits["val"] = np.flatnonzero(labels_K[scan.splits["val"]["label"].to_numpy()] >= 0)
    del labels_N
    for split in ("val", "train"):  # the smaller first
        tables[split] = _take(scan.splits.pop(split), splits.pop(split), labels_K, classes if renamed else None)
    return replace(scan, classes=classes, splits={split: tables[split] for split in ("train", "val")})


def _check_val(scan: Scan, selection: Selection) -> None:
    if "val" not in scan.splits and not selection.val_per_class:
        raise DataError(
            f"{scan.root} has no validation split: choose one with --val-per-class, such as --val-per-class 50."
        )
    if "val" in scan.splits and selection.val_per_class:
        raise DataError(
            f"--val-per-class={selection.val_per_class} is for sources without a validation split, and {scan.root} has "
            f"one: remove the option."
        )


def _count(scan: Scan, reason: str, classes: list[str]) -> None:
    for name in classes:
        scan.ignored.add(reason, name)


def _check_counts(classes: tuple[str, ...], counts_K: NDArray[np.int64], val_per_class: int) -> None:
    small = [f"{classes[k]} ({counts_K[k]})" for k in np.flatnonzero(counts_K <= val_per_class)]
    if small:
        raise DataError(
            f"--val-per-class={val_per_class} leaves no training image of {len(small):,} classes: {listed(small)}. "
            f"Drop small classes with --min-images, or choose fewer images per class."
        )


def _choose(table: pa.Table, labels_N: NDArray[np.int32], selection: Selection) -> NDArray[np.bool_]:
    """Returns whether each image is among the `val_per_class` ones of its class with the smallest hashes; label -1: no.

    An image's hash depends on its name `CLASS/FILE` and the seed only.
    """
    key = selection.seed.to_bytes(8, "little")
    hashes_N = np.empty(len(table), np.uint64)
    for start in range(0, len(table), _HASH_ROWS):
        names = table["name"].slice(start, _HASH_ROWS).to_pylist()
        digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in names)
        hashes_N[start : start + len(names)] = np.frombuffer(digests, "<u8")
    order_N = np.lexsort((hashes_N, labels_N))
    del hashes_N
    starts_K = np.searchsorted(labels_N[order_N], np.arange(labels_N.max() + 1, dtype=np.int32))
    chosen_N = np.zeros(len(order_N), np.bool_)
    for start in starts_K:
        chosen_N[order_N[start : start + selection.val_per_class]] = True
    return chosen_N


def _take(
    table: pa.Table, rows_n: NDArray[np.int64], labels_K: NDArray[np.int32], classes: tuple[str, ...] | None
) -> pa.Table:
    """Returns some rows with new labels, and names with the class's new name if `classes` are given."""
    schema, columns = table.schema, {}
    for name in schema.names:
        columns[name] = table[name].take(rows_n)
        table = table.drop_columns(name)  # frees the column if nothing else refers to it
    labels_n = labels_K[columns["label"].to_numpy()]
    columns["label"] = pa.array(labels_n)
    if classes is not None:
        files = pc.replace_substring_regex(columns["name"], r"^.*/", "")
        columns["name"] = pc.binary_join_element_wise(pa.array(classes).take(pa.array(labels_n)), files, "/")
    return pa.table(columns, schema=schema).combine_chunks()
