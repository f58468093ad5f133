"""ImageNet-21k: one archive per WordNet id, classes with enough images, a validation split chosen by hashes."""

import shutil
from pathlib import Path

import pytest

from pipeline.data.dataset import open_splits, read_manifest
from pipeline.data.tools.index_in_place import index_in_place
from pipeline.data.tools.layouts import detect_layout
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, PrepareResult, prepare
from pipeline.data.tools.selection import Selection
from pipeline.data.tools.stats import stats
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError
from tests.data import synthetic
from tests.data.synthetic import CLASSES

WNIDS = [f"n{number:08d}" for number in (1440764, 2105855, 4557648, 7753592)]
COUNTS = dict(zip(WNIDS, (9, 6, 3, 12), strict=True))


def archives(counts: dict[str, int]) -> dict[str, bytes]:
    image = synthetic.encoded(synthetic.image(1))
    return {
        f"{wnid}.tar": synthetic.tar({f"{wnid}_{i}.JPEG": image for i in range(count)})
        for wnid, count in counts.items()
    }


def write(root: Path, counts: dict[str, int] = COUNTS) -> Path:
    root.mkdir(parents=True)
    for name, content in archives(counts).items():
        (root / name).write_bytes(content)
    return root


def run(source: Path, target: Path, selection: Selection, workers: int = 1, **arguments: object) -> PrepareResult:
    with Pool(workers) as pool:
        return prepare(source, target, PrepareOptions(shard_bytes=20_000), pool, selection=selection, **arguments)


def names(root: Path, split: str) -> list[str]:
    indexes = dict(zip(("train", "val"), open_splits(str(root), "train", "val", root), strict=True))
    return sorted(indexes[split].to_table()["name"].to_pylist())


def write_whole(root: Path) -> Path:
    root.mkdir()
    (root / "fall11_whole.tar").write_bytes(synthetic.tar(archives(COUNTS)))
    return root


@pytest.mark.parametrize("place", ["top", "below", "one archive"])
def test_the_three_forms_of_imagenet_21k_give_the_same_images(place, tmp_path):
    write(tmp_path / "plain")
    source = tmp_path / "source"
    if place == "one archive":
        write_whole(source)
    else:
        write(source / "winter21_whole" if place == "below" else source)
    assert detect_layout(source).name == "wordnet-tars"
    done = run(source, tmp_path / "set", Selection(min_images=4, val_per_class=2))
    assert done.manifest.classes == (WNIDS[0], WNIDS[1], WNIDS[3])
    assert [done.manifest.splits[split].samples for split in ("train", "val")] == [21, 6]
    assert done.notes == [f"ignored: 1 classes with fewer than 4 training images: {WNIDS[2]}"]
    assert done.manifest.made["selection"] == {"min_images": 4, "val_per_class": 2, "seed": 0}
    with Pool(1) as pool:
        assert verify(tmp_path / "set", pool).errors == []
    run(tmp_path / "plain", tmp_path / "expected", Selection(min_images=4, val_per_class=2))
    for split in ("train", "val"):
        assert names(tmp_path / "set", split) == names(tmp_path / "expected", split)


def test_the_validation_split_depends_on_names_and_seed_only(tmp_path):
    source = write(tmp_path / "source")
    run(source, tmp_path / "one", Selection(val_per_class=2))
    run(source, tmp_path / "three", Selection(val_per_class=2), workers=3)
    chosen = names(tmp_path / "one", "val")
    assert names(tmp_path / "three", "val") == chosen
    assert [sum(name.startswith(wnid) for name in chosen) for wnid in WNIDS] == [2] * 4
    assert not set(chosen) & set(names(tmp_path / "one", "train"))
    run(source, tmp_path / "seeded", Selection(val_per_class=2, seed=1))
    assert names(tmp_path / "seeded", "val") != chosen
    more = write(tmp_path / "more", COUNTS | {"n00000001": 5})
    run(more, tmp_path / "with-more", Selection(val_per_class=2))
    assert set(chosen) <= set(names(tmp_path / "with-more", "val"))


def test_a_class_list_restricts_and_merges_classes(tmp_path):
    source = write(tmp_path / "source")
    file = tmp_path / "classes.txt"
    file.write_text(f"{WNIDS[3]} fruit\n{WNIDS[0]} animal\n{WNIDS[1]} animal\n")
    done = run(source, tmp_path / "set", Selection(file, min_images=10, val_per_class=1))
    assert done.manifest.classes == ("animal", "fruit")
    assert done.notes == [f"ignored: 1 classes that are not in the list: {WNIDS[2]}"]
    train, val = open_splits(str(tmp_path / "set"), "train", "val", tmp_path)
    assert (len(train), len(val)) == (9 + 6 + 12 - 2, 2)
    for name, label in zip(train.to_table()["name"].to_pylist(), train.labels_N, strict=True):
        folder, file_name = name.split("/")
        assert folder == train.classes[label] == ("fruit" if file_name.startswith(WNIDS[3]) else "animal")
    file.write_text("n01440765\n")
    with pytest.raises(DataError, match=f"'n01440765' .similar: '{WNIDS[0]}'"):
        run(source, tmp_path / "other", Selection(file, val_per_class=1))


def test_an_existing_validation_split_follows_the_training_classes(tmp_path):
    tree = synthetic.images()
    tree["train"][CLASSES[1]] = dict(list(tree["train"][CLASSES[1]].items())[:3])
    synthetic.write_folders(tmp_path / "source", tree)
    done = run(tmp_path / "source", tmp_path / "set", Selection(min_images=4))
    assert done.manifest.classes == (CLASSES[0], CLASSES[2])
    for split in ("train", "val"):
        assert {name.partition("/")[0] for name in names(tmp_path / "set", split)} == {CLASSES[0], CLASSES[2]}
    with pytest.raises(DataError, match="--val-per-class=2 is for sources without a validation split"):
        run(tmp_path / "source", tmp_path / "other", Selection(val_per_class=2))


@pytest.mark.parametrize("layout", ["folders", "webdataset", "parquet"])
def test_other_sources_without_a_validation_split_get_one(layout, tmp_path):
    source = tmp_path / "source"
    tree = synthetic.images()
    {
        "folders": synthetic.write_folders,
        "webdataset": synthetic.write_webdataset,
        "parquet": synthetic.write_parquet,
    }[layout](source, tree)
    if layout == "folders":
        shutil.rmtree(source / "val")
    for file in source.rglob("*validation*"):
        file.unlink()
    assert detect_layout(source).name == layout
    with pytest.raises(DataError, match=r"has no validation split: choose one with --val-per-class, such as"):
        run(source, tmp_path / "set", Selection())
    done = run(source, tmp_path / "set", Selection(val_per_class=1))
    assert done.manifest.splits["val"].samples == len(tree["train"])
    assert done.manifest.splits["train"].samples == sum(map(len, tree["train"].values())) - len(tree["train"])


def test_archives_are_indexed_in_place_with_a_selection(tmp_path):
    root = write(tmp_path / "set")
    with Pool(1) as pool:
        with pytest.raises(DataError, match="has no validation split"):
            index_in_place(root, pool)
        manifest, notes = index_in_place(root, pool, selection=Selection(min_images=4, val_per_class=2))
        assert verify(root, pool).errors == []
    assert notes == [f"ignored: 1 classes with fewer than 4 training images: {WNIDS[2]}"]
    assert {split: len(content.shards) for split, content in manifest.splits.items()} == {"train": 3, "val": 3}
    train, val = open_splits(str(root), "train", "val", tmp_path)
    assert not set(train.to_table()["name"].to_pylist()) & set(val.to_table()["name"].to_pylist())
    assert len({bytes(train.read(i)) for i in range(len(train))} | {bytes(val.read(i)) for i in range(len(val))}) == 1
    run(write(tmp_path / "copy"), tmp_path / "prepared", Selection(min_images=4, val_per_class=2))
    assert names(root, "val") == names(tmp_path / "prepared", "val")


def test_a_source_without_a_validation_split_can_be_verified(tmp_path):
    source = write(tmp_path / "source")
    with Pool(1) as pool:
        report = verify(source, pool)
        assert {split: content.samples for split, content in report.splits.items()} == {"train": sum(COUNTS.values())}
        assert stats(source, 0, pool).splits["train"].per_class == list(COUNTS.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: (r / "copy").mkdir() or shutil.copy(r / f"{WNIDS[0]}.tar", r / "copy"),
            "archives of the same class",
        ),
        (
            lambda r: (r / f"{WNIDS[1]}.tar").write_bytes((r / f"{WNIDS[1]}.tar").read_bytes()[:-9000]),
            f"{WNIDS[1]}.tar is truncated",
        ),
        (
            lambda r: (r / "other.tar").write_bytes(synthetic.tar({"a.jpg": b"x"})),
            "other.tar must contain one archive WNID.tar per class; it contains a.jpg",
        ),
        (lambda r: (r / "n00000002.tar").symlink_to("gone"), "n00000002.tar is a broken link to gone"),
        (
            lambda r: (r / "n00000002.tar").write_bytes(archives({"n00000002": 2})["n00000002.tar"]),
            r"--val-per-class=2 leaves no training image of 1 classes: n00000002 \(2\). Drop small classes with",
        ),
    ],
)
def test_archives_that_cannot_be_used_are_named(change, message, tmp_path):
    source = write(tmp_path / "source")
    change(source)
    with pytest.raises(DataError, match=message):
        run(source, tmp_path / "set", Selection(val_per_class=2))


def test_no_class_with_enough_images_is_an_error(tmp_path):
    with pytest.raises(
        DataError, match="has no class with 500 training images, the largest has 12: lower --min-images"
    ):
        run(write(tmp_path / "source"), tmp_path / "set", Selection(min_images=500, val_per_class=50))


def test_other_files_and_empty_archives_are_counted(tmp_path):
    source = write(tmp_path / "source" / "winter21_whole", COUNTS | {"n00000009": 0})
    (source / "readme.txt").touch()
    (source.parent / "winter21_whole.tar.gz").touch()
    done = run(source.parent, tmp_path / "set", Selection(val_per_class=1))
    assert done.notes == [
        "ignored: 1 class archives without images: n00000009.tar",
        "ignored: 2 files next to the data: winter21_whole.tar.gz, winter21_whole/readme.txt",
    ]
    shutil.rmtree(source)
    with pytest.raises(DataError, match="Unpack winter21_whole.tar.gz first"):
        run(source.parent, tmp_path / "other", Selection(val_per_class=1))
    assert read_manifest(tmp_path / "other") is None
