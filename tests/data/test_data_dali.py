"""The data loader: pixels equal torchvision's and are the same at any world size; corrupt files are named."""

import dataclasses
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from pipeline.config_data import Augment
from pipeline.data.augment import Augmentations, AutoAugment
from pipeline.data.auto_augment import suite
from pipeline.data.dali import Batch, Loader
from pipeline.data.dataset import open_split, open_splits
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, PlannedBatch, TrainPlan, micro_batch
from pipeline.errors import DataError

SIDE = 32


def loader(index: DatasetIndex, batch: int = 8, interpolation: str = "bilinear", **rest: object) -> Loader:
    """Pixels as 0..255, not normalized."""
    return Loader(
        index,
        device="cpu",
        device_id=None,
        threads=2,
        max_batch_size=batch,
        interpolation=interpolation,
        mean=(0, 0, 0),
        std=(1 / 255, 1 / 255, 1 / 255),
        **rest,
    )


def train_plan(index: DatasetIndex) -> TrainPlan:
    return TrainPlan(3, index.widths_N, index.heights_N, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)


@pytest.fixture
def train_index(folders) -> DatasetIndex:
    root = folders()
    return open_splits(str(root), "train", "val", root.parent / "cache")[0]


def together(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    return (
        torch.cat([b.images_NCHW for b in batches]),
        torch.cat([b.labels_N for b in batches]),
        np.concatenate([b.ids_N for b in batches]),
    )


STEPS, GLOBAL = 5, 24  # 120 positions, 41 samples: two epochs end inside batches


def global_batches(
    index: DatasetIndex, workers: int, device_batch: int
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Concatenates all ranks' micro-batches in the order of the positions."""
    plan, grad_accum = train_plan(index), GLOBAL // (workers * device_batch)

    def planned(rank: int) -> Iterator[PlannedBatch]:
        for step in range(STEPS):
            for micro in range(grad_accum):
                yield plan.batch(micro_batch(step, micro, rank, workers, device_batch, grad_accum), SIDE)

    by_rank = []
    for rank in range(workers):
        with loader(index, device_batch) as reader:
            by_rank.append(list(reader.run(planned(rank))))
    return together([by_rank[rank][i] for i in range(STEPS * grad_accum) for rank in range(workers)])


def test_global_batches_are_the_same_at_any_world_size_and_micro_batch_size(train_index):
    images, labels, ids = global_batches(train_index, 1, 24)
    assert labels.dtype == torch.int64
    for epoch in range(2):
        assert sorted(ids[41 * epoch : 41 * (epoch + 1)]) == list(range(41))
    assert labels.tolist() == train_index.labels_N[ids].tolist()
    for workers, device_batch in ((2, 12), (2, 3), (3, 4), (4, 6), (4, 1)):
        other_images, other_labels, other_ids = global_batches(train_index, workers, device_batch)
        assert other_ids.tolist() == ids.tolist(), (workers, device_batch)
        assert torch.equal(other_labels, labels), (workers, device_batch)
        assert torch.equal(other_images, images), (workers, device_batch)


def test_resuming_in_the_middle_gives_the_same_batches(train_index):
    plan = train_plan(train_index)
    with loader(train_index) as reader:
        whole = list(reader.run(plan.batch(micro_batch(s, 0, 0, 1, 8, 1), SIDE) for s in range(20)))
        rest = list(reader.run(plan.batch(micro_batch(s, 0, 0, 1, 8, 1), SIDE) for s in range(13, 20)))
    assert torch.equal(together(whole[13:])[0], together(rest)[0])


def test_runs_repeat_after_an_unfinished_run(train_index):
    plan = train_plan(train_index)
    batches = [plan.batch(micro_batch(s, 0, 0, 1, 8, 1), SIDE) for s in range(10)]
    with loader(train_index) as reader:
        first = together(list(reader.run(batches)))[0]
        abandoned = reader.run(iter(batches))
        next(abandoned)
        abandoned.close()
        assert torch.equal(together(list(reader.run(batches)))[0], first)


def test_a_new_run_ends_an_unfinished_one(train_index):
    plan = train_plan(train_index)
    batches = [plan.batch(micro_batch(s, 0, 0, 1, 8, 1), SIDE) for s in range(10)]
    with loader(train_index) as reader:
        left_open = reader.run(iter(batches))
        next(left_open)
        ids = [batch.ids_N.tolist() for batch in reader.run(batches[5:])]
        assert ids == [planned.ids_B.tolist() for planned in batches[5:]]
        with pytest.raises(RuntimeError, match="has ended"):
            next(left_open)
        left_open = reader.run(iter(batches))
        next(left_open)
    with pytest.raises(RuntimeError, match="has ended"):
        next(left_open)


def test_a_run_of_no_batches_is_empty_and_the_next_is_not(train_index):
    batches = [train_plan(train_index).batch(np.arange(8), SIDE)]
    with loader(train_index) as reader:
        assert [len(list(reader.run(b))) for b in ([], batches, [], batches)] == [0, 1, 0, 1]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_an_error_of_the_plan_is_not_reported_as_a_corrupt_file(train_index, kind):
    def planned() -> Iterator[PlannedBatch]:
        yield train_plan(train_index).batch(np.arange(8), SIDE)
        raise kind("of the plan")

    with loader(train_index) as reader, pytest.raises(kind, match="^of the plan$"):
        list(reader.run(planned()))


def test_partial_and_single_batches_and_two_loaders_at_once(train_index):
    plan = EvalPlan(train_index.widths_N, train_index.heights_N, SIDE, SIDE)
    batches = [plan.batch(np.arange(8)), plan.batch(np.arange(8, 11)), plan.batch(np.array([40]))]
    with loader(train_index) as one, loader(train_index) as two:
        pairs = list(zip(one.run(batches), two.run(batches), strict=True))
    assert [len(a.labels_N) for a, _ in pairs] == [8, 3, 1]
    assert all(torch.equal(a.images_NCHW, b.images_NCHW) for a, b in pairs)


def native_threads() -> set[str]:
    """Native threads of this process, including DALI's; its first pipeline starts some that never stop."""
    return set(os.listdir("/proc/self/task"))


def test_closing_leaves_no_threads(train_index):
    plan = train_plan(train_index)
    with loader(train_index):
        pass
    gc.collect()
    before, native_before = set(threading.enumerate()), native_threads()
    with loader(train_index) as reader:
        run = reader.run(plan.batch(micro_batch(s, 0, 0, 1, 8, 1), SIDE) for s in range(100))
        next(run)
        assert len(native_threads() - native_before) > 2
    assert set(threading.enumerate()) == before
    assert native_threads() <= native_before
    with pytest.raises(RuntimeError, match="closed"):
        next(reader.run([]))


def run_over(index: DatasetIndex) -> None:
    plan = EvalPlan(index.widths_N, index.heights_N, SIDE, SIDE)
    with loader(index) as reader:
        for _ in reader.run(plan.batch(np.arange(s, min(s + 8, len(index)))) for s in range(0, len(index), 8)):
            pass


def test_a_file_truncated_after_indexing_is_named(train_index):
    file = train_index.path(20)
    file.write_bytes(file.read_bytes()[:-2].ljust(file.stat().st_size, b"\0"))
    with pytest.raises(DataError, match="is a truncated JPEG") as error:
        run_over(train_index)
    assert str(file) in str(error.value)


def test_a_file_that_dali_cannot_decode_is_named(train_index):
    file = train_index.path(20)
    content = bytearray(file.read_bytes())
    content[4:-2] = b"\x55" * (len(content) - 6)  # valid start and end markers, no data between them
    file.write_bytes(content)
    with pytest.raises(DataError, match="corrupt image files") as error:
        run_over(train_index)
    assert str(file) in str(error.value)
    assert str(train_index.path(19)) not in str(error.value)


def test_a_corrupt_file_is_not_reported_before_it_is_needed(train_index):
    """A run that ends before it succeeds, and the loader stays usable; the run that needs the file fails."""
    file = train_index.path(12)
    content = bytearray(file.read_bytes())
    content[4:-2] = b"\x55" * (len(content) - 6)
    file.write_bytes(content)
    plan = EvalPlan(train_index.widths_N, train_index.heights_N, SIDE, SIDE)
    batches = [plan.batch(np.arange(s, s + 8)) for s in range(0, 40, 8)]
    with loader(train_index) as reader:
        run = reader.run(iter(batches))
        next(run)
        run.close()
        assert len(list(reader.run(batches[2:]))) == 3
        with pytest.raises(DataError, match="corrupt image files") as error:
            list(reader.run(batches))
    assert str(file) in str(error.value)


def test_stored_orientation_is_not_applied_to_tiff_either(folders):
    root = folders()
    stored = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(stored).save(root / "train" / "a" / "0.jpg", "TIFF", exif=exif)
    index, _ = open_splits(str(root), "train", "val", root.parent / "cache")
    assert (index.widths_N[0], index.heights_N[0]) == (60, 40)
    with loader(index) as reader:
        (batch,) = reader.run([EvalPlan(index.widths_N, index.heights_N, 40, 40).batch(np.arange(1))])
    assert torch.equal(batch.images_NCHW[0], torch.from_numpy(stored[:, 10:50].astype(np.float32)).permute(2, 0, 1))


@pytest.fixture
def samples_index(imagenet_samples: Path, tmp_path: Path) -> DatasetIndex:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "any").symlink_to(imagenet_samples)
    return open_split(tmp_path, "val", tmp_path / "cache")


def assert_close(images_NCHW: torch.Tensor, expected: list[Image.Image], mean: float, most: float) -> None:
    """Checks that pixels of 0..255 differ by at most `mean` on average, and by at most `most` anywhere."""
    expected_NCHW = torch.stack([tv.pil_to_tensor(image) for image in expected])
    difference = (images_NCHW - expected_NCHW).abs()
    print(f"mean difference {difference.mean():.4f}, largest {difference.max():.0f} of 255")
    assert difference.mean() <= mean
    assert difference.max() <= most


@pytest.mark.parametrize(
    ("interpolation", "resized_by", "mean", "most"),
    [
        ("bilinear", "torch", 0.01, 1),
        ("bicubic", "torch", 0.01, 2),
        ("bilinear", "DALI", 0.2, 1),  # as on a GPU
        ("bicubic", "DALI", 0.2, 12),
    ],
)
def test_evaluation_pixels_equal_torchvisions(samples_index, interpolation, resized_by, mean, most):
    ids = np.arange(len(samples_index))
    planned = EvalPlan(samples_index.widths_N, samples_index.heights_N, 256, 224).batch(ids)
    augment = Augment()
    if resized_by == "DALI":  # DALI resizes if it augments: use its identity operator
        augment = Augment(auto_augment="trivialaugment")
        identity = [op.name for op in suite("trivialaugment")].index("identity")
        nothing = np.zeros((len(ids), 1), np.int32)
        auto = AutoAugment(nothing + identity, nothing, nothing)
        planned = dataclasses.replace(planned, augmentations=Augmentations(auto_augment=auto))
    with loader(samples_index, len(ids), interpolation, augment=augment) as reader:
        (batch,) = reader.run([planned])
    expected = []
    for i in ids:
        with Image.open(samples_index.path(i)) as image:  # some are gray, one has an EXIF rotation
            resized = tv.resize(image.convert("RGB"), 256, InterpolationMode(interpolation))
        expected.append(tv.center_crop(resized, 224))
    assert_close(batch.images_NCHW, expected, mean, most)


def test_training_pixels_equal_torchvisions_for_the_same_window(samples_index):
    """Pixels at the border of a decoded window differ: chroma upsampling lacks their neighbors."""
    planned = train_plan(samples_index).batch(np.arange(len(samples_index)), 224)
    with loader(samples_index, len(planned)) as reader:
        (batch,) = reader.run([planned])
    assert 0 < planned.flips_B.sum() < len(planned)
    expected = []
    for i, sample in enumerate(planned.ids_B):
        box = [int(v) for v in (*planned.window_starts_B2[i], *planned.window_shapes_B2[i])]
        with Image.open(samples_index.path(sample)) as image:
            cut = tv.resized_crop(image.convert("RGB"), *box, [224, 224], InterpolationMode.BILINEAR)
        expected.append(tv.hflip(cut) if planned.flips_B[i] else cut)
    assert_close(batch.images_NCHW, expected, 0.1, 4)
