"""`append`: new shards after the old ones, the same rows, all or nothing after a kill; the data card."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.data.dataset import open_splits, read_manifest
from pipeline.data.index import DatasetIndex
from pipeline.data.tools import append as append_module
from pipeline.data.tools.append import AppendResult, append
from pipeline.data.tools.data_card import Origin
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, PrepareResult, prepare
from pipeline.data.tools.verify import verify
from pipeline.errors import DataError
from tests.data import synthetic
from tests.data.synthetic import CLASSES

OPTIONS = PrepareOptions(shard_bytes=20_000, shorter_side=48, quality=90)


def made(source: Path, target: Path, **arguments: object) -> PrepareResult:
    with Pool(1) as pool:
        return prepare(source, target, OPTIONS, pool, **arguments)


def extend(source: Path, target: Path, **arguments: object) -> AppendResult:
    with Pool(1) as pool:
        return append(source, target, pool, **arguments)


def opened(root: Path) -> tuple[DatasetIndex, DatasetIndex]:
    return open_splits(str(root), "train", "val", root)


def rows(index: DatasetIndex) -> list[dict[str, object]]:
    return index.to_table().to_pylist()


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set with three classes."""
    synthetic.write_ilsvrc(tmp_path / "old", synthetic.images())
    made(tmp_path / "old", tmp_path / "set", origin=Origin("CC BY 4.0", "https://example.org/old"))
    return tmp_path / "set"


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """Class folders without a validation split, with new images of two classes in another order of labels."""
    folder = tmp_path / "more" / "train"
    for number, name in enumerate([CLASSES[2], CLASSES[1]] * 6):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"new_{number}.JPEG").write_bytes(synthetic.encoded(synthetic.image(300 + number, (90, 70))))
    return tmp_path / "more"


def test_new_images_follow_the_old_ones_in_new_shards(root, more):
    train, val = opened(root)
    old_rows, old_val, old_shards = rows(train), rows(val), contents(root / "train")
    done = extend(more, root, origin=Origin(source="https://example.org/more"))
    assert done.images == {"train": 12}
    train, val = opened(root)
    assert rows(train)[: len(old_rows)] == old_rows
    assert rows(val) == old_val
    new = rows(train)[len(old_rows) :]
    assert {str(row["name"]).partition("/")[0] for row in new} == {CLASSES[1], CLASSES[2]}
    assert all(CLASSES[int(str(row["label"]))] == str(row["name"]).partition("/")[0] for row in new)
    assert all(min(int(str(row["width"])), int(str(row["height"]))) == 48 for row in new), "the set's options apply"
    assert contents(root / "train").items() >= old_shards.items()
    numbers = sorted(int(path[-10:-4]) for path in done.manifest.splits["train"].shards)
    assert numbers == list(range(len(numbers))) and len(numbers) > len(old_shards)
    with Pool(1) as pool:
        assert verify(root, pool).errors == []
    assert not (root / ".prepare").exists()
    card = (root / "README.md").read_text()
    assert "- Appended: 12 images of train, layout folders, source https://example.org/more\n" in card
    assert f"| train | {len(train)} |" in card and f"- train: `{train.fingerprint}`" in card


def test_a_repeated_append_changes_nothing_and_a_second_one_continues(root, more):
    extend(more, root)
    before = contents(root)
    assert extend(more, root).is_repeated
    assert contents(root) == before
    (more / "train" / CLASSES[2] / "later.JPEG").write_bytes(synthetic.encoded(synthetic.image(400)))
    with pytest.raises(DataError, match=r"has 12 of these images already, by their names: train/n02105855/new_1.JPEG"):
        extend(more, root)
    done = extend(more, root, skip_existing=True)
    assert (done.images, done.skipped_existing) == ({"train": 1}, 12)
    assert done.manifest.splits["train"].index == "index/train-2.arrow"
    assert [entry["images"] for entry in done.manifest.made["appended"]] == [{"train": 12}, {"train": 1}]
    (more / "train" / CLASSES[2] / "later.JPEG").unlink()
    (more / "train" / CLASSES[2] / "new_0.JPEG").unlink()
    with pytest.raises(DataError, match="has no image that .* lacks: there is nothing to append"):
        extend(more, root, skip_existing=True)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["write_parts", "save_split", "write_data_card", "save"])
def test_after_a_kill_at_any_step_the_set_is_the_old_one_and_the_same_command_completes_it(
    step, root, more, tmp_path, monkeypatch
):
    shutil.copytree(root, tmp_path / "whole")
    extend(more, tmp_path / "whole")
    before, old_rows = contents(root), rows(opened(root)[0])

    def kill(*arguments: object, **more_arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if step == "save":
            patch.setattr(append_module.Manifest, "save", kill)
        else:
            patch.setattr(append_module, step, kill)
        with pytest.raises(Killed):
            extend(more, root)
    assert (root / "dataset.json").read_bytes() == before["dataset.json"]
    assert rows(opened(root)[0]) == old_rows
    assert extend(more, root).images == {"train": 12}
    assert contents(root) == contents(tmp_path / "whole")


def test_a_kill_after_the_last_step_does_not_block_the_next_append(root, more):
    (root / ".prepare").mkdir()
    (root / ".prepare" / "job").write_text(f"{read_manifest(root).made['job']} 1")
    extend(more, root)
    (root / ".prepare").mkdir()
    (root / ".prepare" / "job").write_text("append 0123")
    (more / "train" / CLASSES[2] / "later.JPEG").write_bytes(synthetic.encoded(synthetic.image(400)))
    with pytest.raises(DataError, match=r"unfinished append of another source: repeat that command, or"):
        extend(more, root, skip_existing=True)


def test_new_classes_and_other_targets_are_refused(root, more, tmp_path):
    (more / "train" / "n99999999").mkdir()
    (more / "train" / "n99999999" / "a.JPEG").write_bytes(synthetic.encoded(synthetic.image(1)))
    with pytest.raises(DataError, match="has 1 classes that .* lacks: n99999999. New classes change the labels"):
        extend(more, root)
    with pytest.raises(DataError, match="has no dataset.json: give a data set"):
        extend(more, tmp_path / "old")
    with Pool(1) as pool:
        prepare(tmp_path / "old", tmp_path / "folders", PrepareOptions(to="folders"), pool)
    with pytest.raises(DataError, match=r"was not written as shards by `densenet data prepare` \(made.to=folders\)"):
        extend(more, tmp_path / "folders")


def test_corrupt_images_are_named_or_skipped(root, more):
    (more / "train" / CLASSES[1] / "page.JPEG").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"1 corrupt images in .*\n.*page.JPEG"):
        extend(more, root)
    done = extend(more, root, skip_corrupt=True)
    assert (done.images, len(done.skipped_corrupt)) == ({"train": 12}, 1)


def test_the_data_card_describes_the_set(root, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    made(tmp_path / "old", tmp_path / "set2", origin=Origin("CC BY 4.0", "https://example.org/old"))
    card = (tmp_path / "set2" / "README.md").read_text()
    assert "on 2023-11-14." in card
    train, val = opened(tmp_path / "set2")
    for line in (
        f"| train | {len(train)} | ",
        "- License: CC BY 4.0\n",
        "- Source: https://example.org/old\n",
        "- Layout of the source: ilsvrc\n",
        "- Validation split: the source's\n",
        "a shorter side of at most 48 pixels",
        "quality 90\n",
        f"- val: `{val.fingerprint}`\n",
    ):
        assert line in card, line
    made(tmp_path / "old", tmp_path / "set2", origin=Origin("CC0"))  # a finished set: the new license is recorded
    assert "- License: CC0\n" in (tmp_path / "set2" / "README.md").read_text()
    recorded = json.loads((tmp_path / "set2" / "dataset.json").read_text())["made"]
    assert (recorded["license"], recorded["source"]) == ("CC0", "https://example.org/old")
