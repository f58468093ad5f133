"""`data.classes`: subsets and merges of classes, on class folders and shards, in every place that opens data."""

from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline.data.dataset import open_splits
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.errors import DataError


@pytest.fixture(params=["folders", "shards"])
def root(request, folders, tmp_path) -> Path:
    source = folders()
    if request.param == "folders":
        return source
    with Pool(1) as pool:
        prepare(source, tmp_path / "shards", PrepareOptions(shard_bytes=9_000), pool)
    return tmp_path / "shards"


def write_list(folder: Path, text: str) -> Path:
    (folder / "classes.txt").write_text(text)
    return folder / "classes.txt"


def class_of_path(path: Path, name: str) -> str:
    return path.parent.name if path.suffix != ".tar" else name


def test_a_subset_has_the_images_of_its_classes_in_their_order(root, tmp_path):
    whole, _ = open_splits(str(root), "train", "val", tmp_path)
    chosen, val = open_splits(str(root), "train", "val", tmp_path, classes=write_list(tmp_path, "c\na  # kept\n"))
    assert chosen.classes == val.classes == ("a", "c")
    rows = [i for i in range(len(whole)) if whole.classes[whole.labels_N[i]] != "b"]
    assert len(chosen) == len(rows) < len(whole)
    for row, i in enumerate(rows):
        assert chosen.read(row).tobytes() == whole.read(i).tobytes()
        assert chosen.classes[chosen.labels_N[row]] == whole.classes[whole.labels_N[i]]
        assert chosen.describe(row) == whole.describe(i)
    assert set(chosen.shards) == (set(chosen.files) if chosen.in_shards else set())
    assert chosen.fingerprint != whole.fingerprint
    assert chosen.summary.counts_K == tuple(np.bincount(chosen.labels_N))


def test_classes_are_merged_and_opened_from_the_cache_later(root, tmp_path):
    file = write_list(tmp_path, "a,big cat\nb,dog\nc,big cat\n")
    merged, _ = open_splits(str(root), "train", "val", tmp_path, classes=file)
    whole, _ = open_splits(str(root), "train", "val", tmp_path)
    assert merged.classes == ("big cat", "dog")
    assert [merged.classes[k] for k in merged.labels_N] == [("big cat", "dog", "big cat")[k] for k in whole.labels_N]
    saved = {path: path.stat().st_mtime_ns for path in tmp_path.glob("classes-*.arrow")}
    assert len(saved) == 2
    again, _ = open_splits(str(root), "train", "val", tmp_path, classes=file)
    assert again.fingerprint == merged.fingerprint
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("classes-*.arrow")} == saved


def test_the_public_api_has_the_chosen_classes(root, tmp_path):
    data = pipeline.open_dataset(root, cache=tmp_path, classes=write_list(tmp_path, "b\nc"))
    assert data.classes == data.index("val").classes == ("b", "c")
    assert data.sizes["train"] == 27
    (first, *_) = data.batches("val", 8)
    assert set(first.labels_N.tolist()) <= {0, 1}


def test_a_split_without_the_classes_is_named(root, tmp_path):
    with pytest.raises(DataError, match="classes.txt has 1 classes that do not exist: 'd'"):
        open_splits(str(root), "train", "val", tmp_path, classes=write_list(tmp_path, "a\nb\nd\n"))
