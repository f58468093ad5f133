"""The data loader: shards equal folders, corrupt samples are replaced, sizes may change, nothing leaks."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipeline.config import RunConfig
from pipeline.data.batches import train_plan as configured_plan
from pipeline.data.dali import Loader
from pipeline.data.dataset import open_splits
from pipeline.data.index import DatasetIndex
from pipeline.data.order import WindowedOrder
from pipeline.data.plan import EvalPlan, PlannedBatch, TrainPlan, micro_batch
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from pipeline.errors import DataError
from tests.data import synthetic

SIDE = 32


def loader(index: DatasetIndex, batch: int = 6, **rest: object) -> Loader:
    return Loader(
        index,
        device="cpu",
        device_id=None,
        threads=2,
        max_batch_size=batch,
        interpolation="bilinear",
        mean=(0, 0, 0),
        std=(1 / 255, 1 / 255, 1 / 255),
        **rest,
    )


def train_plan(index: DatasetIndex) -> TrainPlan:
    return TrainPlan(3, index.widths_N, index.heights_N, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)


def run(reader: Loader, plan: TrainPlan, steps: int = 12, batch: int = 6) -> tuple[torch.Tensor, list[int]]:
    batches = list(reader.run(plan.batch(micro_batch(s, 0, 0, 1, batch, 1), SIDE) for s in range(steps)))
    return torch.cat([b.images_NCHW for b in batches]), [int(i) for b in batches for i in b.ids_N]


def prepare_index(tmp_path: Path, to: str) -> DatasetIndex:
    synthetic.write_folders(tmp_path / "source", synthetic.images())
    with Pool(1) as pool:
        prepare(tmp_path / "source", tmp_path / to, PrepareOptions(to=to, shard_bytes=20_000), pool)
    return open_splits(str(tmp_path / to), "train", "val", tmp_path)[0]


def test_shards_and_folders_give_the_same_pixels(tmp_path):
    shards, folders = prepare_index(tmp_path, "shards"), prepare_index(tmp_path, "folders")
    assert (shards.in_shards, folders.in_shards) == (True, False)
    names = [path.partition("/")[2] for path in folders.to_table()["path"].to_pylist()]
    twins = np.array([names.index(name) for name in shards.to_table()["name"].to_pylist()])
    plans = [EvalPlan(index.widths_N, index.heights_N, SIDE, SIDE) for index in (shards, folders)]
    with loader(shards, 32) as one, loader(folders, 32) as two:
        (a,), (b,) = one.run([plans[0].batch(np.arange(32))]), two.run([plans[1].batch(twins)])
    assert torch.equal(a.images_NCHW, b.images_NCHW)
    assert torch.equal(a.labels_N, b.labels_N)


@pytest.mark.parametrize("readers", [0, 1, 7])
def test_any_number_of_reading_threads_gives_the_same(readers, tmp_path):
    index = prepare_index(tmp_path, "shards")
    with loader(index) as usual, loader(index, readers=readers) as other:
        expected, ids = run(usual, train_plan(index))
        images, other_ids = run(other, train_plan(index))
    assert other_ids == ids
    assert torch.equal(images, expected)


def test_the_image_size_may_change_between_batches(tmp_path):
    index = prepare_index(tmp_path, "shards")
    plan = train_plan(index)
    with loader(index) as reader:
        batches = list(reader.run(plan.batch(np.arange(6 * i, 6 * i + 6), side) for i, side in enumerate((16, 24, 40))))
        (alone,) = reader.run([plan.batch(np.arange(6, 12), 24)])
    assert [tuple(b.images_NCHW.shape) for b in batches] == [(6, 3, side, side) for side in (16, 24, 40)]
    assert torch.equal(batches[1].images_NCHW, alone.images_NCHW)


def overwrite(index: DatasetIndex, sample: int, content: bytes) -> None:
    """Overwrites a sample's file, keeping its size."""
    file = index.path(sample)
    stat = file.stat()
    file.write_bytes(content[: stat.st_size].ljust(stat.st_size, b"\0"))


@pytest.fixture
def corrupt(folders, tmp_path) -> tuple[DatasetIndex, set[int]]:
    """Class folders with corrupt images: one fails when read, two only in DALI."""
    root = folders()
    index, _ = open_splits(str(root), "train", "val", tmp_path / "cache")
    overwrite(index, 5, b"<html>")
    for sample in (11, 23):  # start and end are valid, but the quantization tables are missing
        content = bytearray(index.path(sample).read_bytes())
        at = content.index(b"\xff\xdb")
        content[at : at + 2] = b"\xff\xfe"
        index.path(sample).write_bytes(bytes(content))
    return index, {5, 11, 23}


def test_corrupt_images_are_errors_unless_they_may_be_skipped(corrupt):
    index, bad = corrupt
    with loader(index) as reader, pytest.raises(DataError) as error:
        run(reader, train_plan(index))
    assert any(str(index.path(sample)) in str(error.value) for sample in bad)


def test_corrupt_images_are_replaced_alike_at_any_world_size(corrupt):
    index, bad = corrupt
    plan = train_plan(index)
    with loader(index, replacement_plan=plan) as reader:
        images, ids = run(reader, plan)
        assert set(reader.skipped) == bad
        assert all(str(index.path(sample)) in reason for sample, reason in reader.skipped.items())
        again, _ = run(reader, plan)  # with the corrupt samples known
    assert torch.equal(again, images)
    planned = [int(i) for i in plan.locate(np.arange(72))[1]]
    assert all(i not in bad for i in ids)
    assert [i for i, p in zip(ids, planned, strict=True) if p not in bad] == [p for p in planned if p not in bad]
    assert (images.flatten(1).amax(dim=1) > 0).all()  # never a black image
    by_rank = []
    for rank in range(2):
        with loader(index, 3, replacement_plan=plan) as reader:
            steps = (plan.batch(micro_batch(s, 0, rank, 2, 3, 1), SIDE) for s in range(12))
            by_rank.append([batch.images_NCHW for batch in reader.run(steps)])
    together = torch.cat([by_rank[rank][step] for step in range(12) for rank in range(2)])
    assert torch.equal(together, images)


def test_corrupt_bytes_in_a_shard_are_detected_and_can_be_skipped(tmp_path):
    index = prepare_index(tmp_path, "shards")
    offset, length = (index.to_table()[name][3].as_py() for name in ("offset", "length"))
    with index.path(3).open("r+b") as file:
        file.seek(offset + length // 2)
        file.write(b"rot")
    plan = train_plan(index)
    with loader(index) as reader, pytest.raises(DataError, match=r"does not have the checksum .* data.on_corrupt=skip"):
        run(reader, plan)
    with loader(index, replacement_plan=plan) as reader:
        _, ids = run(reader, plan)
        assert list(reader.skipped) == [3]
        assert 3 not in ids


def test_missing_files_are_errors_and_never_skipped(tmp_path):
    index = prepare_index(tmp_path, "shards")
    plan = train_plan(index)
    index.path(0).unlink()
    with loader(index, replacement_plan=plan) as reader, pytest.raises(DataError, match="cannot be read: No such file"):
        run(reader, plan)


def test_a_completely_corrupt_data_set_is_an_error(corrupt):
    index, _ = corrupt
    for sample in range(len(index)):
        overwrite(index, sample, b"x")
    with (
        loader(index, replacement_plan=train_plan(index)) as reader,
        pytest.raises(DataError, match="All its replacements are corrupt"),
    ):
        run(reader, train_plan(index))


def shared_memory(process: psutil.Process) -> set[str]:
    """Returns the shared memory files that a process has mapped."""
    return {area.path for area in process.memory_maps() if area.path.startswith("/dev/shm")}


def test_fifty_epochs_leak_no_memory_threads_or_files(tmp_path):
    index = prepare_index(tmp_path, "shards")
    plan, process = train_plan(index), psutil.Process()
    shared = shared_memory(process)
    threads = threading.active_count()

    def epochs(count: int) -> Iterator[PlannedBatch]:
        for step in range(count * len(index) // 8):
            yield plan.batch(micro_batch(step, 0, 0, 1, 8, 1), SIDE)

    with loader(index, 8) as reader:
        for _ in reader.run(epochs(10)):
            pass
        gc.collect()
        before, files = process.memory_info().rss, process.num_fds()
        for _ in reader.run(epochs(50)):
            pass
        gc.collect()
        assert process.memory_info().rss - before < 8e6
        assert process.num_fds() == files
    assert threading.active_count() == threads
    assert shared_memory(process) == shared


def test_windowed_shuffle_with_windows_of_one_shard_and_of_all_shards(tmp_path):
    index = prepare_index(tmp_path, "shards")
    plan = configured_plan(RunConfig.model_validate({"data": {"shuffle": "windowed", "window": 1}}), index)
    assert plan.first_rows_S1 is not None and len(plan.first_rows_S1) == len(index.shards) + 1 > 3
    _, ids_B = plan.locate(np.arange(len(index)))
    shards_B = plan.first_rows_S1.searchsorted(ids_B, "right") - 1
    assert (np.diff(shards_B) != 0).sum() == len(index.shards) - 1  # one shard after the other
    assert sorted(ids_B) == list(range(len(index)))
    all_shards = [
        WindowedOrder(3, plan.first_rows_S1, window).ids(0, np.arange(len(index))).tolist() for window in (40, 90)
    ]
    assert all_shards[0] == all_shards[1]
