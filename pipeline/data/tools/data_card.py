"""The data card, README.md in a prepared data set: contents, source, license and processing, for people."""

import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.dataset import Manifest, open_index
from pipeline.data.index import DatasetIndex
from pipeline.data.space import format_bytes
from pipeline.files import write_text

DATA_CARD = "README.md"


@dataclass(frozen=True)
class Origin:
    """What only people know of the data: its license, and its source, a citation or an address."""

    license: str | None = None
    source: str | None = None

    def to_json(self) -> dict[str, str]:
        """Returns what is known, for `dataset.json`."""
        known = {"license": self.license, "source": self.source}
        return {key: value for key, value in known.items() if value is not None}


UNKNOWN = Origin()


def write_data_card(root: Path, manifest: Manifest) -> None:
    """Writes README.md from the manifest and the indexes, which must exist already.

    Its date is that of SOURCE_DATE_EPOCH (seconds, https://reproducible-builds.org) or else today, in UTC.
    """
    indexes = {split: open_index(root, manifest, split) for split in manifest.splits}
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    date = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    write_text(root / DATA_CARD, data_card(manifest, indexes, f"{date:%Y-%m-%d}"))


def data_card(manifest: Manifest, indexes: dict[str, DatasetIndex], date: str) -> str:
    """Returns the card as Markdown; `indexes` has the index of each split."""
    made, classes = manifest.made, manifest.classes
    version = importlib.metadata.version("densenet-pipeline")
    lines = [
        "# Image classification data set",
        "",
        f"{len(classes):,} classes, from {classes[0]} to {classes[-1]}; written by densenet-pipeline {version} on "
        f"{date}. `dataset.json` has the same for programs, and all classes.",
        "",
        "| split | images | bytes | images per class: minimum, median, maximum | shards |",
        "|---|---|---|---|---|",
    ]
    for name, split in manifest.splits.items():
        counts_K = np.bincount(indexes[name].labels_N, minlength=len(classes))
        per_class = f"{counts_K.min():,}, {np.median(counts_K):,g}, {counts_K.max():,}"
        lines.append(
            f"| {name} | {split.samples:,} | {format_bytes(split.bytes)} | {per_class} | {len(split.shards) or '-'} |"
        )
    lines += ["", "## Source", "", *_bullets(_source(made)), "", "## Processing", "", *_bullets(_processing(made))]
    for title, key in (("Ignored files and classes", "not_taken"), ("Skipped corrupt images", "ignored")):
        if made.get(key):
            lines += ["", f"## {title}", "", *_bullets(made[key])]
    lines += ["", "## Fingerprints", "", "SHA-256 over classes, paths, offsets, lengths and labels.", ""]
    lines += _bullets(f"{name}: `{index.fingerprint}`" for name, index in indexes.items())
    return "\n".join(lines) + "\n"


def _bullets(lines: Any) -> list[str]:
    return [f"- {line}" for line in lines]


def _source(made: dict[str, Any]) -> Iterator[str]:
    yield f"License: {made.get('license') or 'not stated'}"
    yield f"Source: {made.get('source') or 'not stated'}"
    yield f"Layout of the source: {made['from']}"
    for appended in made.get("appended", ()):
        counts = ", ".join(f"{count:,} images of {split}" for split, count in appended["images"].items())
        yield f"Appended: {counts}, layout {appended['from']}, source {appended.get('source') or 'not stated'}"


def _processing(made: dict[str, Any]) -> Iterator[str]:
    selection = made.get("selection", {})
    if "classes" in selection:
        yield f"Classes: those in the list {selection['classes']}, which may merge classes"
    if "min_images" in selection:
        yield f"Classes: only those with at least {selection['min_images']:,} images in the source"
    if "val_per_class" in selection:
        yield (
            f"Validation split: of each class the {selection['val_per_class']:,} images whose names have the smallest "
            f"keyed BLAKE2b hashes, seed {selection['seed']}"
        )
    else:
        yield "Validation split: the source's"
    if made["shorter_side"] is None:
        yield "Images: copied byte for byte, except those that are not gray or RGB JPEGs"
    else:
        yield (
            f"Images: encoded again with a shorter side of at most {made['shorter_side']} pixels (Lanczos), or copied "
            f"where that takes more bytes"
        )
    yield f"Encoded again: {made['converted']:,} images as JPEG, quality {made['quality']}"
    if made["to"] == "shards":
        yield f"Order: shuffled over each split, seed {made['seed']}; appended images follow, shuffled in themselves"
