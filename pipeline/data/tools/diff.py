"""`densenet data diff`: compares two data sets image by image, from their indexes alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.dataset import MANIFEST, open_index, read_manifest
from pipeline.errors import DataError, listed

Match = Literal["name", "content"]
_COLUMNS = ("crc32", "length", "width", "height")
KINDS = {
    "added": "only in the second set",
    "removed": "only in the first set",
    "relabeled": "in another class",
    "moved": "in another split",
    "reencoded": "in the same class, with other bytes",
}


@dataclass(frozen=True)
class _Set:
    """The images of all splits of a data set, one after the other: arrays over its N images.

    Split and class numbers are positions in lists that both sets share. Sizes (pixels) and checksums are -1 if they are
    not known.
    """

    root: Path
    classes: tuple[str, ...]
    files: pa.ChunkedArray
    split_N: NDArray[np.int8]
    class_N: NDArray[np.int32]
    crc32_N: NDArray[np.int64]
    lengths_N: NDArray[np.int64]
    widths_N: NDArray[np.int32]
    heights_N: NDArray[np.int32]


@dataclass(frozen=True)
class Difference:
    """How the data set `b` differs from `a`.

    `key` is what identifies an image in both: `FILE`, `CLASS/FILE`, `SPLIT/CLASS/FILE`, or `content`. Images that have
    the same key are numbered in the order of the index. `rows` has for each of `KINDS` the rows [n, 2] of the images in
    a and b, -1 if it is missing there.
    """

    a: _Set
    b: _Set
    key: str
    class_names: tuple[str, ...]
    split_names: tuple[str, ...]
    rows: dict[str, NDArray[np.int64]]

    @property
    def counts(self) -> dict[str, int]:
        """The number of images of each kind."""
        return {kind: len(rows) for kind, rows in self.rows.items()}

    @cached_property
    def classes_added(self) -> list[str]:
        """Classes of b only."""
        return [name for name in self.b.classes if name not in set(self.a.classes)]

    @cached_property
    def classes_removed(self) -> list[str]:
        """Classes of a only."""
        return [name for name in self.a.classes if name not in set(self.b.classes)]

    @property
    def labels_changed(self) -> int:
        """Number of classes of both sets whose label differs."""
        labels = {name: label for label, name in enumerate(self.a.classes)}
        return sum(labels.get(name, label) != label for label, name in enumerate(self.b.classes))

    @property
    def is_equal(self) -> bool:
        """Whether both sets have the same images with the same labels in the same splits."""
        return not any(self.counts.values()) and self.a.classes == self.b.classes

    def lines(self, kind: str, limit: int | None = None) -> Iterator[str]:
        """Yields a line for each image of a kind, or for the first `limit`."""
        for row_a, row_b in self.rows[kind][:limit].tolist():
            here, there = self._describe(self.a, row_a), self._describe(self.b, row_b)
            if kind == "reencoded":
                yield f"{here}: {_content(self.a, row_a)} -> {_content(self.b, row_b)}"
            else:
                yield " -> ".join(filter(None, (here, there)))

    def to_json(self) -> dict[str, Any]:
        """Returns the complete report as a JSON object."""
        return {
            "equal": self.is_equal,
            "sets": [str(self.a.root), str(self.b.root)],
            "images": [len(self.a.class_N), len(self.b.class_N)],
            "key": self.key,
            "classes": {
                "added": self.classes_added,
                "removed": self.classes_removed,
                "labels_changed": self.labels_changed,
            },
            "counts": self.counts,
        } | {kind: list(self.lines(kind)) for kind in KINDS}

    def _describe(self, data: _Set, row: int) -> str:
        """Returns `SPLIT/CLASS/FILE`, or an empty string for row -1."""
        if row < 0:
            return ""
        return f"{self.split_names[data.split_N[row]]}/{self.class_names[data.class_N[row]]}/{data.files[row].as_py()}"


def diff(root_a: Path, root_b: Path, match: Match = "name") -> Difference:
    """Compares two prepared or indexed data sets; images are identified by file name, or by checksum and length.

    By name, the class folder is not a part of the key, so that an image in another class is recognized, unless the file
    names of a set are not unique: then the key is `CLASS/FILE`, and `SPLIT/CLASS/FILE` where that is not unique either.

    Raises:
        DataError: a folder is not a data set, or has no checksums to match by content.
    """
    class_numbers: dict[str, int] = {}
    split_numbers: dict[str, int] = {}
    a, b = (_open(root, class_numbers, split_numbers) for root in (root_a, root_b))
    if match == "content":
        lacking = [str(data.root) for data in (a, b) if (data.crc32_N < 0).any()]
        if lacking:
            raise DataError(f"{listed(lacking)} has no checksums: `densenet data index` creates them.")
        key, codes_a, codes_b = "content", *_content_codes(a, b)
    else:
        key, codes_a, codes_b = _name_codes(a, b, len(class_numbers), len(split_numbers))
    return Difference(a, b, key, tuple(class_numbers), tuple(split_numbers), _compare(a, b, codes_a, codes_b))


def _open(root: Path, class_numbers: dict[str, int], split_numbers: dict[str, int]) -> _Set:
    """Opens all splits of a data set; adds its classes and splits to the numbers that both sets share."""
    manifest = read_manifest(root)
    if manifest is None:
        raise DataError(f"{root} has no {MANIFEST}: create it with `densenet data prepare` or `densenet data index`.")
    numbers_K = np.array([class_numbers.setdefault(name, len(class_numbers)) for name in manifest.classes], np.int32)
    names: list[pa.Array] = []
    columns: dict[str, list[NDArray[Any]]] = {key: [] for key in ("split", "class", *_COLUMNS)}
    for split in manifest.splits:
        table = open_index(root, manifest, split).to_table()
        name = table["path"].cast(pa.string()) if manifest.layout == "folders" else table["name"]
        names += pc.replace_substring_regex(name, r"^.*/", "").chunks
        columns["split"].append(np.full(len(table), split_numbers.setdefault(split, len(split_numbers)), np.int8))
        columns["class"].append(numbers_K[table["label"].to_numpy()])
        for key in _COLUMNS:
            columns[key].append(pc.fill_null(table[key].cast(pa.int64()), -1).to_numpy())
    joined = {key: np.concatenate(values) for key, values in columns.items()}
    return _Set(
        root,
        manifest.classes,
        pa.chunked_array(names, pa.string()),
        joined["split"],
        joined["class"],
        joined["crc32"],
        joined["length"],
        joined["width"].astype(np.int32),
        joined["height"].astype(np.int32),
    )


def _name_codes(
    a: _Set, b: _Set, num_classes: int, num_splits: int
) -> tuple[str, NDArray[np.int64], NDArray[np.int64]]:
    """Returns the first kind of key that is unique in both sets, and the number of each image's key."""
    codes = pa.chunked_array(a.files.chunks + b.files.chunks, pa.string()).combine_chunks().dictionary_encode()
    code_M = codes.indices.to_numpy().astype(np.int64)
    count = len(a.class_N)
    for key in ("FILE", "CLASS/FILE", "SPLIT/CLASS/FILE"):
        if key == "CLASS/FILE":
            code_M = code_M * num_classes + np.concatenate([a.class_N, b.class_N])
        elif key == "SPLIT/CLASS/FILE":
            code_M = code_M * num_splits + np.concatenate([a.split_N, b.split_N])
        if all(len(np.unique(part)) == len(part) for part in (code_M[:count], code_M[count:])):
            return key, code_M[:count], code_M[count:]
    return key, code_M[:count], code_M[count:]


def _content_codes(a: _Set, b: _Set) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    code_a, code_b = ((data.crc32_N << 31) ^ data.lengths_N for data in (a, b))
    return code_a, code_b


def _compare(a: _Set, b: _Set, codes_a: NDArray[np.int64], codes_b: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Matches the images by code and, for equal codes, by their order; returns the rows of each kind of change."""
    (keys_a, order_a), (keys_b, order_b) = _numbered(codes_a), _numbered(codes_b)
    place = np.searchsorted(keys_b, keys_a)  # of each image of a among those of b
    found = place < len(keys_b)
    found[found] = keys_b[place[found]] == keys_a[found]
    row_a, row_b = order_a[found], order_b[place[found]]
    is_new = np.ones(len(keys_b), np.bool_)
    is_new[place[found]] = False
    same_class = a.class_N[row_a] == b.class_N[row_b]
    pairs = np.stack([row_a, row_b], axis=1)
    removed, added = order_a[~found], order_b[is_new]
    rows = {
        "added": np.stack([np.full(len(added), -1), added], axis=1),
        "removed": np.stack([removed, np.full(len(removed), -1)], axis=1),
        "relabeled": pairs[~same_class],
        "moved": pairs[a.split_N[row_a] != b.split_N[row_b]],
        "reencoded": pairs[same_class & _bytes_differ(a, row_a, b, row_b)],
    }
    return {kind: changed[np.lexsort((changed[:, 1], changed[:, 0]))] for kind, changed in rows.items()}


def _numbered(codes: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Returns sorted, distinct keys (code, number among equal codes), and the rows that they belong to."""
    order = np.argsort(codes, kind="stable")
    codes = codes[order]
    starts = np.flatnonzero(np.append(True, codes[1:] != codes[:-1])) if len(codes) else np.empty(0, np.int64)
    numbers = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    keys = np.empty(len(codes), [("code", np.int64), ("number", np.int64)])
    keys["code"], keys["number"] = codes, numbers
    return keys, order


def _bytes_differ(a: _Set, row_a: NDArray[np.int64], b: _Set, row_b: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns whether lengths, checksums or, where there are no checksums, image sizes differ."""
    lengths = a.lengths_N[row_a] != b.lengths_N[row_b]
    crc32_a, crc32_b = a.crc32_N[row_a], b.crc32_N[row_b]
    checked = (crc32_a >= 0) & (crc32_b >= 0)
    sizes = (a.widths_N[row_a] != b.widths_N[row_b]) | (a.heights_N[row_a] != b.heights_N[row_b])
    return lengths | np.where(checked, crc32_a != crc32_b, sizes)


def _content(data: _Set, row: int) -> str:
    crc32 = f", CRC-32 {data.crc32_N[row]:08x}" if data.crc32_N[row] >= 0 else ""
    return f"{data.lengths_N[row]:,} bytes, {data.widths_N[row]} x {data.heights_N[row]}{crc32}"
