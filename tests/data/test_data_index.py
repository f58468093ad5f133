"""Class folders and the index: accepted files, refused files, and error messages."""

import json
import os
import pickle
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.dataset import index_file, open_splits
from pipeline.data.index import DatasetIndex
from pipeline.data.tables import rows_of, save_table, table_of
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError


def open_set(root: Path, cache: Path | None = None):
    return open_splits(str(root), "train", "val", cache or root.parent / "cache")


def test_rows_are_sorted_and_labeled_by_class_position(folders):
    train, val = open_set(folders())
    assert (len(train), len(val)) == (41, 12)
    assert train.classes == val.classes == ("a", "b", "c")
    paths = train.to_table()["path"].to_pylist()
    assert paths == sorted(paths)
    assert [train.classes[label] for label in train.labels_N] == [p.split("/")[1] for p in paths]
    for i in (0, 17, 40):
        with Image.open(train.path(i)) as image:
            assert image.size == (train.widths_N[i], train.heights_N[i])
        assert train.read(i).tobytes() == train.path(i).read_bytes()


def test_a_val_split_without_some_class_keeps_the_training_labels(folders):
    root = folders()
    for file in (root / "val" / "a").iterdir():
        file.unlink()
    (root / "val" / "a").rmdir()
    assert set(open_set(root)[1].labels_N) == {1, 2}


def test_sizes_ignore_exif_orientation(folders):
    root = folders()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (60, 40)).save(root / "train" / "a" / "0.jpg", exif=exif)
    train, _ = open_set(root)
    assert (train.widths_N[0], train.heights_N[0]) == (60, 40)


def test_known_files_are_not_opened_again_and_changed_ones_are(folders, tmp_path):
    root = folders()
    first, _ = open_set(root)
    victim = root / first.to_table()["path"][3].as_py()
    stat = victim.stat()
    victim.write_bytes(b"x" * stat.st_size)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again, _ = open_set(root)  # same path, length and time: not opened
    assert again.fingerprint == first.fingerprint
    os.utime(victim)
    with pytest.raises(DataError, match="1 of 41 files"):
        open_set(root)


def test_a_corrupt_cache_is_rebuilt(folders):
    root = folders()
    first, _ = open_set(root)
    for file in (root.parent / "cache").iterdir():
        file.write_bytes(b"no parquet")
    assert open_set(root)[0].fingerprint == first.fingerprint
    assert not list((root.parent / "cache").glob(".partial-*"))


def test_the_fingerprint_depends_on_data_and_not_on_the_root(folders, tmp_path):
    root = folders()
    first, _ = open_set(root)
    moved = root.rename(tmp_path / "elsewhere")
    assert open_set(moved)[0].fingerprint == first.fingerprint
    next((moved / "train" / "a").iterdir()).unlink()
    assert open_set(moved)[0].fingerprint != first.fingerprint


def test_an_index_can_be_sent_to_another_process(folders):
    train, _ = open_set(folders())
    sent = pickle.dumps(train)
    assert pickle.loads(sent).fingerprint == train.fingerprint
    assert train.labels_N.sum() + train.widths_N.sum() > 0
    assert len(pickle.dumps(train)) == len(sent)  # cached values are not pickled


def test_indexing_is_silent_and_leaves_the_warning_filters_as_they_were(folders, recwarn):
    root = folders(train=600)  # files for several threads
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(root / "train" / "a" / "0.jpg", exif=exif.tobytes()[:-4])  # PIL warns of it
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        train, _ = open_set(root)
    finally:
        sys.setswitchinterval(interval)
    assert len(train) == 601
    assert list(warnings.filters) == before
    assert not recwarn.list


def test_valid_files_are_cached_when_others_are_corrupt(folders):
    root = folders()
    bad = root / "train" / "b" / "bad.jpg"
    bad.write_bytes(b"no")
    with pytest.raises(DataError, match="1 of 42 files"):
        open_set(root)
    good = root / "train" / "a" / "it's 000.JPEG"
    stat = good.stat()
    good.write_bytes(b"x" * stat.st_size)
    os.utime(good, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    bad.unlink()
    assert len(open_set(root)[0]) == 41  # `good` was not opened again


def test_a_cache_folder_that_cannot_be_created_is_named(folders):
    root = folders()
    (root.parent / "cache").write_text("a file")
    with pytest.raises(DataError, match="cache: File exists. Set run.output to a writable folder"):
        open_set(root)


def test_a_name_that_is_not_utf8_is_named(folders):
    root = folders()
    file = os.fsencode(root / "train" / "a") + b"/\xff.jpg"
    os.link(root / "train" / "a" / "it's 000.JPEG", file)
    with pytest.raises(DataError, match=r"a/\\xff\.jpg: has a name that is not UTF-8: rename it"):
        open_set(root)
    os.rename(file, os.fsencode(root / "train" / "a" / "ü # \N{CJK UNIFIED IDEOGRAPH-732B}.jpg"))
    assert len(open_set(root)[0]) == 42


PROBLEMS = {
    "text": (b"hello, world", "is not an image of a known format"),
    "html": (b"<html>404</html>", "is not an image of a known format"),
    "gif": (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "is not an image of a known format"),
    "empty": (b"", "it is empty"),
    "truncated jpeg": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "is a truncated JPEG"),
    "truncated png": (b"\x89PNG\r\n\x1a\n\x00\x00", "is a truncated PNG"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_file_that_is_not_a_complete_image_is_named(folders, problem):
    root = folders()
    content, reason = PROBLEMS[problem]
    (root / "train" / "b" / "bad one.JPEG").write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        open_set(root)
    assert "b/bad one.JPEG" in str(error.value)
    assert "1 of 42 files" in str(error.value)


def test_a_jpeg_without_its_last_two_bytes_is_refused_and_one_with_padding_is_not(folders):
    root = folders()
    file = next((root / "train" / "a").iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole + bytes(100))
    open_set(root)
    file.write_bytes(whole[:-2])
    with pytest.raises(DataError, match="truncated"):
        open_set(root)


def test_the_message_about_many_corrupt_files_is_short(folders):
    root = folders()
    for i in range(20):
        (root / "train" / "c" / f"bad{i:02d}.jpg").write_bytes(b"no")
    with pytest.raises(DataError) as error:
        open_set(root)
    assert "20 of 61 files" in str(error.value)
    assert "and 15 more" in str(error.value)
    assert len(str(error.value).splitlines()) == 8


def test_png_named_jpeg_and_hidden_files_are_accepted(folders):
    root = folders()
    Image.new("RGBA", (40, 40)).save(root / "train" / "a" / "0.JPEG", "PNG")
    (root / "train" / "a" / ".DS_Store").write_bytes(b"x")
    (root / "train" / "a" / "Thumbs.db").write_bytes(b"x")
    assert len(open_set(root)[0]) == 42


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "train").rename(r / "training"), "no folder 'train' \\(in it: training, val\\)"),
        (lambda r: (r / "train" / "d").mkdir(), "class folders without files: d"),
        (lambda r: (r / "train" / "a" / "sub").mkdir(), "is a folder inside a class folder"),
        (lambda r: (r / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"x"), "validation images are flat"),
    ],
)
def test_errors_for_a_wrong_layout_name_the_right_one(folders, spoil, message):
    root = folders()
    spoil(root)
    with pytest.raises(DataError, match=message):
        open_set(root)


def test_a_val_class_that_train_lacks_is_named(folders):
    root = folders()
    (root / "train" / "b").rename(root.parent / "away")
    with pytest.raises(DataError, match=r"val has classes that the training split lacks: b"):
        open_set(root)


def test_a_broken_link_is_named(folders):
    root = folders()
    (root / "train" / "a" / "lost.jpg").symlink_to("gone.jpg")
    with pytest.raises(DataError, match=r"train/a/lost.jpg: is a broken link to gone.jpg"):
        open_set(root)


def test_an_unset_root_and_a_missing_root(tmp_path):
    with pytest.raises(DataError, match="data.root is not set"):
        open_splits(None, "train", "val", tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        open_splits(str(tmp_path / "gone"), "train", "val", tmp_path)


def test_reading_detects_a_changed_or_missing_file(folders):
    root = folders()
    train, _ = open_set(root)
    train.path(0).unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        train.read(0)
    train.path(1).write_bytes(b"short")
    with pytest.raises(DataError, match="has changed since it was indexed"):
        train.read(1)
    train.path(2).write_bytes(train.path(2).read_bytes() + b"more")
    with pytest.raises(DataError, match="has changed since it was indexed"):
        train.read(2)


def test_copied_rows_are_pickled_without_their_table():
    table = table_of({"path": [f"{i:050d}" for i in range(10_000)], "label": list(range(10_000))})
    rows = rows_of(table, 9_990, 20)
    assert rows["label"].to_pylist() == list(range(9_990, 10_000))
    assert len(pickle.dumps(rows)) < 10_000


def test_different_data_on_another_node_are_detected(folders, tmp_path):
    """A missing file, a changed size, and that a check of some files checks evenly spaced ones."""
    index, _ = open_set(folders())
    assert index.find_difference(1000) is None
    moved = index.with_root(tmp_path / "elsewhere")
    assert moved.find_difference(1000) == f"{moved.path(0)}: No such file or directory"
    last = index.path(len(index) - 1)
    last.write_bytes(last.read_bytes() + b"x")
    assert "bytes were indexed" not in (index.find_difference(1) or "")
    assert index.find_difference(2).startswith(f"{last} has ")
    assert index.find_difference(2, compare_sizes=False) is None


def write_first_release(root: Path, splits: dict[str, DatasetIndex]) -> None:
    """Writes `dataset.json` and the indexes as the first release did."""
    for split, index in splits.items():
        save_table(index.to_table(), root / "index" / f"{split}.parquet")
    content = json.loads((root / "dataset.json").read_text())
    for split in content["splits"].values():
        (root / split.pop("index")).unlink()
    (root / "dataset.json").write_text(json.dumps(content | {"format": 1}))


@pytest.mark.parametrize("to", ["shards", "folders"])
def test_a_data_set_of_the_first_release_is_the_same_data(folders, tmp_path, to):
    with Pool(1) as pool:
        prepare(folders(), tmp_path / to, PrepareOptions(to=to, shard_bytes=9_000), pool)
    train, val = open_set(tmp_path / to)
    contents = [train.read(i).tobytes() for i in range(len(train))]
    write_first_release(tmp_path / to, {"train": train, "val": val})
    again, _ = open_set(tmp_path / to)
    assert again.fingerprint == train.fingerprint
    assert [again.read(i).tobytes() for i in range(len(again))] == contents
    assert (again.summary, again.shards) == (train.summary, train.shards)


def test_large_indexes_are_opened_by_path_in_other_processes(folders, monkeypatch):
    index, _ = open_set(folders())
    small = pickle.loads(pickle.dumps(index))
    assert small.to_table().equals(index.to_table())
    monkeypatch.setattr("pipeline.data.index._PICKLED_BYTES", 10)
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).to_table().equals(index.to_table())
    index._file.unlink()
    with pytest.raises(DataError, match=r"\.arrow does not exist"):
        pickle.loads(pickled)


def test_a_corrupt_large_index_is_found_by_verify_alone(folders, tmp_path, monkeypatch):
    shards_set = tmp_path / "shards"
    with Pool(1) as pool:
        prepare(folders(), shards_set, PrepareOptions(shard_bytes=9_000), pool)
    file = index_file(shards_set, "train")
    content = bytearray(file.read_bytes())
    labels = content.index(open_set(shards_set)[0].labels_N.tobytes())
    content[labels] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train.arrow cannot be read as an index \(its columns are corrupt\)"):
        open_set(shards_set)
    monkeypatch.setattr("pipeline.data.index_file._CHECKED_BYTES", 10)
    open_set(shards_set)
    with Pool(1) as pool, pytest.raises(DataError, match="its columns are corrupt"):
        verify(shards_set, pool)


def test_long_listings_and_header_checks_report_their_progress(folders, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.data.progress._INTERVAL_S", 0)
    open_set(folders())
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" files, ")[0] for line in lines[:3]] == [
        "listing train: 14",
        "listing train: 28",
        "listing train: 41",
    ]
    assert any(line.startswith("indexing train: 41 of 41 files, ") for line in lines)
