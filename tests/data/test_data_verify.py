"""`verify` finds each injected error; `stats` and `index` describe the data."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.dataset import open_splits
from pipeline.data.images import ignore_pil_warnings
from pipeline.data.tools.image_checks import FINDING_KINDS
from pipeline.data.tools.index_in_place import index_in_place
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.data.tools.stats import plot, stats
from pipeline.data.tools.verify import Report, verify
from pipeline.errors import DataError
from tests.data import synthetic


def run_verify(root: Path, **options: object) -> Report:
    with Pool(1) as pool:
        return verify(root, pool, **options)


@pytest.fixture
def shards(tmp_path) -> Path:
    synthetic.write_ilsvrc(tmp_path / "source", synthetic.images())
    with Pool(1) as pool:
        prepare(tmp_path / "source", tmp_path / "set", PrepareOptions(shard_bytes=20_000), pool)
    return tmp_path / "set"


@pytest.fixture
def class_folders(tmp_path) -> Path:
    synthetic.write_folders(tmp_path / "set", synthetic.images())
    return tmp_path / "set"


def test_a_valid_set_has_no_errors_and_its_statistics_are_right(shards):
    report = run_verify(shards)
    assert report.errors == []
    assert report.counts() == {"exif": 1}
    train = report.splits["train"]
    assert (train.samples, train.classes, train.per_class) == (32, 3, (8, 8, 16))
    assert train.formats == {"JPEG": 32}
    assert train.modes == {"RGB": 31, "L": 1}
    assert report.splits["val"].samples == 9
    assert json.loads(json.dumps(report.to_json()))["corrupt"] is False


def test_sources_can_be_verified_before_they_are_prepared(tmp_path):
    synthetic.write_ilsvrc(tmp_path / "source", synthetic.images())
    report = run_verify(tmp_path / "source")
    assert report.layout == "ilsvrc"
    assert report.counts() == {"format": 1, "color": 2, "exif": 1}
    assert "n02105855_2933.JPEG" in next(f for f in report.findings if f.kind == "format").where


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x55
    file.write_bytes(content)


def flip_image(root: Path) -> None:
    train, _ = open_splits(str(root), "train", "val", root)
    flip(train.path(3), train.to_table()["offset"][3].as_py() + train.to_table()["length"][3].as_py() // 2)


def change_label(root: Path) -> None:
    train, _ = open_splits(str(root), "train", "val", root)
    file = train.path(0)
    content = bytearray(file.read_bytes())
    at = content.index(b"000000000000.cls") + 512
    content[at] = ord("0") + (content[at] - ord("0") + 1) % 3
    file.write_bytes(content)


def swap_shards(root: Path) -> None:
    first, second = root / "train" / "train-000000.tar", root / "train" / "train-000001.tar"
    first.rename(root / "other")
    second.rename(first)
    (root / "other").rename(second)


@pytest.mark.parametrize(
    ("corruption", "kinds"),
    [
        (flip_image, {"checksum", "shard"}),
        (change_label, {"label", "shard"}),
        (swap_shards, {"shard", "checksum"}),
        (lambda r: (r / "train" / "train-000001.tar").unlink(), {"unreadable"}),
        (lambda r: shutil.copy(r / "val" / "val-000000.tar", r / "val" / "val-000007.tar"), {"unlisted"}),
        (lambda r: (r / "val" / "val-000000.tar").write_bytes(b"x" * 600), {"shard", "unreadable"}),
    ],
)
def test_each_problem_in_shards_is_found(corruption, kinds, shards):
    corruption(shards)
    report = run_verify(shards)
    found = {finding.kind for finding in report.errors}
    assert kinds <= found <= kinds | {"unreadable", "size"}  # bytes at another offset may be another image
    assert report.to_json()["corrupt"] is True
    assert len(set(report.findings)) == len(report.findings)


def test_an_index_of_other_shards_is_refused(shards, tmp_path):
    with Pool(1) as pool:
        prepare(tmp_path / "source", tmp_path / "other", PrepareOptions(shard_bytes=9_000, seed=3), pool)
    for file in (tmp_path / "other" / "train").iterdir():
        shutil.copy(file, shards / "train")
    with pytest.raises(DataError, match=r"\d of \d shards in .* are not those that were indexed"):
        open_splits(str(shards), "train", "val", tmp_path)
    assert {"shard", "unlisted"} <= {finding.kind for finding in run_verify(shards).errors}
    shutil.copy(tmp_path / "other" / "index" / "train.arrow", shards / "index")
    (shards / "dataset.json").write_text(
        (shards / "dataset.json").read_text().replace('"samples": 32', '"samples": 31')
    )
    with pytest.raises(DataError, match=r"train.arrow has 32 samples, .*dataset.json has 31"):
        run_verify(shards)


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / "train" / "n01440764" / name).write_bytes(content) and None


WHOLE = synthetic.encoded(synthetic.image(999, (300, 200)))


@pytest.mark.parametrize(
    ("corruption", "kind", "detail"),
    [
        (replaced("cut.JPEG", WHOLE[:-9]), "unreadable", "is a truncated JPEG"),
        (replaced("hole.JPEG", WHOLE[:2000] + WHOLE[-20:]), "unreadable", "cannot be decoded"),
        (replaced("empty.JPEG", b""), "unreadable", "it is empty"),
        (replaced("page.JPEG", b"<html>no</html>"), "unreadable", "begins with '<html>no</html>'"),
        (replaced("a.JPEG", synthetic.encoded(synthetic.image(1), "WEBP")), "format", "is a WEBP named as a JPEG"),
        (replaced("a.png", synthetic.encoded(synthetic.image(1), "PNG")), "format", "is a PNG"),
        (replaced("a.jpg", synthetic.encoded(synthetic.image(1, mode="CMYK"))), "color", "color mode is CMYK"),
        (replaced("a.jpg", synthetic.encoded(synthetic.image(1, (20, 90)))), "small", "20 x 90 pixels"),
    ],
)
def test_each_problem_in_class_folders_is_found(corruption, kind, detail, class_folders):
    clean = run_verify(class_folders)
    corruption(class_folders)
    report = run_verify(class_folders)
    new = [finding for finding in report.findings if finding not in clean.findings]
    assert [(finding.kind, detail in finding.detail) for finding in new] == [(kind, True)]
    assert bool(report.errors) == FINDING_KINDS[kind][0]


def test_duplicates_are_found_within_and_across_splits(class_folders):
    train, val = class_folders / "train", class_folders / "val"
    shutil.copy(train / "n01440764" / "n01440764_0.JPEG", train / "n01440764" / "again.JPEG")
    shutil.copy(train / "n01440764" / "n01440764_1.JPEG", train / "n02105855" / "wrong.JPEG")
    shutil.copy(train / "n01440764" / "n01440764_2.JPEG", val / "n01440764" / "leak.JPEG")
    report = run_verify(class_folders)
    found = {(f.kind, f.where, f.detail) for f in report.findings if f.kind in ("duplicate", "across")}
    assert found == {
        ("duplicate", "train/n01440764/n01440764_0.JPEG", "identical to train/n01440764/again.JPEG"),
        (
            "duplicate",
            "train/n02105855/wrong.JPEG",
            "identical to train/n01440764/n01440764_1.JPEG, in another class",
        ),
        ("across", "val/n01440764/leak.JPEG", "identical to train/n01440764/n01440764_2.JPEG"),
    }


def test_a_set_of_imagenets_classes_must_have_imagenets_numbers(tmp_path):
    content = synthetic.encoded(Image.new("RGB", (40, 40)))
    tree = {split: {f"n{i:08d}": {"1.JPEG": content} for i in range(1000)} for split in ("train", "val")}
    synthetic.write_folders(tmp_path / "set", tree)
    details = [finding.detail for finding in run_verify(tmp_path / "set").errors]
    assert details == [
        "1,000 images, ILSVRC2012 has 1,281,167 (--any-counts for a subset)",
        "1,000 images, ILSVRC2012 has 50,000 (--any-counts for a subset)",
    ]
    assert run_verify(tmp_path / "set", any_counts=True).errors == []


@pytest.mark.parametrize(
    "write", [synthetic.write_folders, synthetic.write_webdataset, synthetic.write_ilsvrc, synthetic.write_kaggle]
)
def test_data_is_indexed_in_place(write, tmp_path):
    tree = synthetic.images()
    write(tmp_path / "set", tree)
    with Pool(1) as pool:
        manifest, _ = index_in_place(tmp_path / "set", pool)
        with pytest.raises(DataError, match="is already indexed"):
            index_in_place(tmp_path / "set", pool)
    assert manifest.classes == synthetic.CLASSES
    assert run_verify(tmp_path / "set").errors == []
    for split, index in zip(tree, open_splits(str(tmp_path / "set"), "train", "val", tmp_path), strict=True):
        stored = sorted((index.classes[label], index.read(i).tobytes()) for i, label in enumerate(index.labels_N))
        assert stored == sorted((wnid, content) for wnid, files in tree[split].items() for content in files.values())


def test_indexing_names_corrupt_images(class_folders):
    replaced("cut.JPEG", WHOLE[:-9])(class_folders)
    with (
        pytest.raises(DataError, match=r"1 corrupt images in train:\n  train/n01440764/cut.JPEG: is a truncated JPEG"),
        Pool(1) as p,
    ):
        index_in_place(class_folders, p)


def test_parquet_files_must_be_prepared_before_verification(tmp_path):
    synthetic.write_parquet(tmp_path / "set", synthetic.images())
    with pytest.raises(DataError, match="convert them with `densenet data prepare`, or train"):
        run_verify(tmp_path / "set")


def test_statistics_match_the_images(shards, tmp_path):
    with Pool(1) as pool:
        result = stats(shards, 0, pool)
        assert len(stats(shards, 5, pool).splits["train"].widths) == 5
    train = result.splits["train"]
    assert (train.samples, train.decoded, train.per_class) == (32, 32, [8, 16, 8])
    index, _ = open_splits(str(shards), "train", "val", tmp_path)
    means, squares = [], []
    for i in range(len(index)):
        with ignore_pil_warnings(), Image.open(io.BytesIO(index.read(i))) as image:
            x = np.asarray(image.convert("RGB"), np.float64) / 255
        means.append(x.mean(axis=(0, 1)))
        squares.append((x**2).mean(axis=(0, 1)))
    assert train.mean == pytest.approx(np.mean(means, axis=0))
    assert train.std == pytest.approx(np.sqrt(np.mean(squares, axis=0) - np.mean(means, axis=0) ** 2))
    assert sorted(train.widths) == sorted(index.widths_N)
    plot(result, tmp_path / "stats.png")
    with Image.open(tmp_path / "stats.png") as image:
        assert image.size[0] > 1000
    assert result.to_json()["splits"]["train"]["widths"]["p100"] == max(train.widths)
