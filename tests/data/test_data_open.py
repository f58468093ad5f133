"""`open_dataset`: same order at any world size, resume at any sample, each evaluation image once, clean shutdown."""

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipeline
from pipeline import Batch, Batches, Dataset
from pipeline.data.index import DatasetIndex
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.errors import ConfigError, DataError, UserError
from tests.data.conftest import write_image

TRAIN, VAL, SIDE = 41, 13, 32


@pytest.fixture
def data(folders, tmp_path) -> Dataset:
    return pipeline.open_dataset(folders(TRAIN, VAL), cache=tmp_path / "cache")


def prepared(data: Dataset, target: Path) -> None:
    with Pool(1) as pool:
        prepare(data.root, target, PrepareOptions(to="shards"), pool)


def together(batches: list[Batch]) -> tuple[torch.Tensor, list[int]]:
    return torch.cat([b.images_NCHW for b in batches]), np.concatenate([b.ids_N for b in batches]).tolist()


def all_ranks(data: Dataset, world_size: int, **options: Any) -> tuple[torch.Tensor, list[int]]:
    """Concatenates all ranks' batches of each step, in order of the ranks."""
    by_rank = [
        list(data.batches("train", 12, rank=rank, world_size=world_size, image_size=SIDE, **options))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    return together([batch for step in zip(*by_rank, strict=True) for batch in step])


def test_global_batches_are_the_same_at_any_world_size(data):
    images, ids = all_ranks(data, 1, seed=5, epochs=2)
    assert len(ids) == 84  # 82 samples in batches of 12
    for epoch in range(2):
        assert sorted(ids[TRAIN * epoch : TRAIN * (epoch + 1)]) == list(range(TRAIN))
    assert ids[:TRAIN] != ids[TRAIN : 2 * TRAIN]
    for world_size in (2, 3, 4, 12):
        other_images, other_ids = all_ranks(data, world_size, seed=5, epochs=2)
        assert other_ids == ids, world_size
        assert torch.equal(other_images, images), world_size
    assert all_ranks(data, 2, seed=6, epochs=2)[1] != ids


@pytest.mark.parametrize("start", [12, 36, 17, 41, 50])
def test_resuming_at_any_sample_gives_the_same_batches(data, start):
    images, ids = together(list(data.batches("train", 12, image_size=SIDE, epochs=3)))
    later_images, later_ids = all_ranks(data, 2, start=start, epochs=3)
    count = min(len(ids) - start, len(later_ids))
    assert count >= 3 * TRAIN - start
    assert later_ids[:count] == ids[start : start + count]
    assert torch.equal(later_images[:count], images[start : start + count])


def test_stop_and_epochs_end_the_batches(data):
    def steps(**options: Any) -> int:
        batches = data.batches("train", 10, image_size=SIDE, **options)
        found = list(batches)
        assert len(found) == len(batches)
        assert all(len(batch.ids_N) == 10 for batch in found)
        return len(found)

    assert steps() == 5  # to the end of the first epoch
    assert steps(start=50) == 4  # of the second one
    assert steps(stop=20) == 2
    assert steps(start=10, stop=31) == 3
    assert steps(epochs=1.5) == 7
    assert steps(start=41, epochs=1) == 0


def test_evaluation_gives_each_image_once_over_all_ranks(data):
    whole_images, whole_ids = together(list(data.batches("val", 4, image_size=SIDE)))
    assert whole_ids == list(range(VAL))
    for world_size in (1, 2, 4):
        ranks = [data.batches("val", 4, rank=r, world_size=world_size, image_size=SIDE) for r in range(world_size)]
        found = [(len(batches), list(batches)) for batches in ranks]
        assert all(count == len(batches) for count, batches in found)
        images, ids = together([batch for _, batches in found for batch in batches])
        assert ids == whole_ids
        assert torch.equal(images, whole_images)
    train_ids = together(list(data.batches("train", 12, training=False)))[1]
    assert train_ids == list(range(TRAIN))


def test_pixels_are_those_of_the_config(data):
    gray = pipeline.load_config({"model": {"in_chans": 1}, "data": {"mean": [0, 0, 0], "std": [1, 1, 1]}})
    (batch, *_) = data.batches("val", 4, image_size=SIDE, config=gray)
    assert batch.images_NCHW.shape == (4, 1, SIDE, SIDE)
    assert batch.images_NCHW.min() >= 0 and batch.images_NCHW.max() <= 1
    mixed = pipeline.load_config({"augment": {"mixup_alpha": 0.2}, "data": {"image_size": 48}})
    (batch, *_) = data.batches("train", 4, config=mixed)
    assert batch.images_NCHW.shape == (4, 3, 48, 48)
    assert batch.targets.shape == (4, 3)


def loader_threads() -> list[str]:
    names = ("plan", "read", "resize")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.mark.parametrize("how", ["close", "with", "break", "error"])
def test_an_unfinished_loop_is_closed(data, how):
    def few(batches: Batches) -> None:
        for _, _ in zip(range(2), batches, strict=False):
            assert loader_threads()
            if how == "error":
                raise KeyError("of the loop")
            if how == "break":
                break

    batches = data.batches("train", 4, image_size=SIDE)
    if how == "with":
        with batches:
            few(batches)
    elif how == "error":
        with pytest.raises(KeyError):
            few(batches)
    else:
        few(batches)
    if how == "close":
        batches.close()
    if how in ("close", "with"):
        assert list(batches) == []
    del batches
    gc.collect()
    assert loader_threads() == []


def test_batches_start_no_threads_before_iteration(data):
    batches = data.batches("train", 4, image_size=SIDE)
    assert len(batches) == 11
    assert loader_threads() == []
    batches.close()


def test_a_prepared_data_set_equals_its_class_folders(data, folders, tmp_path):
    prepared(data, tmp_path / "shards")
    shards = pipeline.open_dataset(tmp_path / "shards")
    assert shards.splits == data.splits == ("train", "val")
    assert shards.classes == data.classes == ("a", "b", "c")
    assert shards.sizes == data.sizes == {"train": TRAIN, "val": VAL}
    assert repr(shards) == f"Dataset({tmp_path / 'shards'}: train, val; 3 classes)"

    def mean(of: Dataset) -> float:
        return float(together(list(of.batches("val", 13, image_size=SIDE)))[0].mean())

    assert mean(shards) == pytest.approx(mean(data), abs=1e-5)


def test_class_folders_alone_are_one_split(data, tmp_path):
    alone = pipeline.open_dataset(data.root / "val", cache=tmp_path)
    assert alone.splits == ("all",)
    assert alone.classes == ("a", "b", "c")
    assert together(list(alone.batches("all", 4, image_size=SIDE)))[1] == list(range(VAL))


def test_labels_are_positions_in_the_training_classes(tmp_path):
    for split, classes in (("train", "abc"), ("val", "bc")):
        for name in classes:
            write_image(tmp_path / "set" / split / name / "1.JPEG", 1, 40, 40)
    data = pipeline.open_dataset(tmp_path / "set", cache=tmp_path / "cache")
    with pytest.warns(UserWarning, match="a"):
        assert data.index("val").labels_N.tolist() == [1, 2]


def test_the_demo_data_set_is_digits(tmp_path):
    data = pipeline.open_dataset("digits://", cache=tmp_path)
    assert data.sizes == {"train": 1437, "val": 360}
    assert data.classes == tuple("0123456789")


def test_corrupt_images_are_errors_or_replaced(data):
    file = data.index("train").path(3)
    whole = file.read_bytes()
    file.write_bytes(whole[:-40] + bytes(40))  # same size, without its end
    with pytest.raises(DataError, match=file.name):
        list(data.batches("train", 4, image_size=SIDE))
    batches = data.batches("train", 4, image_size=SIDE, config=pipeline.load_config({"data": {"on_corrupt": "skip"}}))
    ids = together(list(batches))[1]
    assert 3 not in ids
    assert list(batches.skipped) == [3]
    assert file.name in batches.skipped[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10, "world_size": 4}, "batch_size=10 .* multiple of world_size=4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2 must be from 0 to world_size - 1, and world_size is 2"),
        ({"image_size": 4}, "image_size=4 must be from 8 to 1024"),
        ({"device": "tpu"}, "device=tpu is unknown: use cpu, or cuda"),
        ({"start": -1}, "start=-1 must be from 0 to"),
        ({"start": 90, "stop": 80}, "start=90 must be from 0 to the end of the batches, which is at 80 samples"),
        ({"stop": 80, "epochs": 2}, "stop=80 and epochs=2 both set"),
        ({"training": False, "start": 7}, "start=7 has no effect in evaluation"),
        ({"split": "test"}, "has no split 'test', it has train, val"),
        ({"config": {"data": {"shuffle": "windowed"}}}, "data.shuffle=windowed .* there are none"),
        ({"config": {"augment": {"mixup_alpha": 0.2}}, "batch_size": 6, "world_size": 2}, "mix pairs of images"),
    ],
)
def test_invalid_arguments_are_named(data, options, message):
    arguments: dict[str, Any] = {"split": "train", "batch_size": 8} | options
    if "config" in arguments:
        arguments["config"] = pipeline.load_config(arguments["config"])
    with pytest.raises(UserError, match=message):
        data.batches(**arguments)


def test_roots_that_are_no_data_set_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone is not a folder"):
        pipeline.open_dataset(tmp_path / "gone")
    with pytest.raises(DataError, match=r"s3://bucket/set is a URI: pass stage=FOLDER"):
        pipeline.open_dataset("s3://bucket/set")
    with pytest.raises(ConfigError, match=r"the config is not a valid config:\n  data.hflip: .* got 7"):
        pipeline.load_config({"data": {"hflip": 7}})


def test_a_uri_is_staged(data, tmp_path):
    prepared(data, tmp_path / "shards")
    remote = pipeline.open_dataset(f"file://{tmp_path / 'shards'}", stage=tmp_path / "disk", cache=tmp_path / "cache")
    assert remote.splits == ("train", "val")
    index: DatasetIndex = remote.index("val")
    assert tmp_path / "disk" in index.path(0).parents
    assert len(together(list(remote.batches("val", 4, image_size=SIDE)))[1]) == VAL
