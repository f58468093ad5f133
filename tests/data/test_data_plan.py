"""The samplers: random numbers, order, crops, evaluation batches of ranks."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipeline.data.philox import philox
from pipeline.data.plan import EvalPlan, TrainPlan, micro_batch, rank_eval_batches


def words(text: str) -> tuple[np.ndarray, ...]:
    return tuple(np.array([int(word, 16)], np.uint64) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_passes_the_known_answer_tests_of_random123(counter, key, expected):
    assert [f"{int(w):08x}" for w in philox(words(counter), key)[:, 0]] == expected.split()


def plan(n: int = 103, **changes: object) -> TrainPlan:
    rng = np.random.default_rng(0)
    arguments = {
        "seed": 7,
        "widths_N": rng.integers(40, 900, n),
        "heights_N": rng.integers(40, 900, n),
        "scale": (0.08, 1.0),
        "ratio": (3 / 4, 4 / 3),
        "hflip": 0.5,
    }
    return TrainPlan(**(arguments | changes))


def test_each_epoch_is_another_permutation():
    p, n = plan(), 103
    epochs_B, ids_B = p.locate(np.arange(3 * n))
    assert epochs_B.tolist() == [0] * n + [1] * n + [2] * n
    orders = ids_B.reshape(3, n)
    for order in orders:
        assert sorted(order) == list(range(n))
    assert len({tuple(order) for order in orders.tolist()}) == 3


def test_the_order_depends_on_the_seed():
    assert plan().locate(np.arange(50))[1].tolist() != plan(seed=8).locate(np.arange(50))[1].tolist()


def test_a_samples_crop_does_not_depend_on_its_batch():
    p = plan()
    whole = p.batch(np.arange(95, 115), 32)  # the end of one epoch and the start of the next
    for i in range(20):
        single = p.batch(np.array([95 + i]), 32)
        for name in ("ids_B", "window_starts_B2", "window_shapes_B2", "flips_B"):
            assert np.array_equal(getattr(single, name)[0], getattr(whole, name)[i]), name


def test_a_samples_crop_and_flip_differ_between_epochs():
    p, n = plan(), 103
    first, second = (p.batch(np.arange(epoch * n, (epoch + 1) * n), 32) for epoch in range(2))
    a, b = np.argsort(first.ids_B), np.argsort(second.ids_B)
    same_window = (first.window_shapes_B2[a] == second.window_shapes_B2[b]).all(axis=1)
    assert same_window.mean() < 0.1
    assert 0.3 < (first.flips_B[a] == second.flips_B[b]).mean() < 0.7


def test_windows_reach_every_possible_position():
    n = 2000
    b = plan(n, widths_N=np.full(n, 8), heights_N=np.full(n, 8)).batch(np.arange(n), 32)
    small = (b.window_shapes_B2 == 5).all(axis=1)
    for axis in range(2):
        assert set(b.window_starts_B2[small, axis].tolist()) == {0, 1, 2, 3}


def test_windows_are_inside_and_respect_area_and_ratio():
    sides = np.random.default_rng(2).integers(250, 500, (2, 1000))
    p = plan(1000, widths_N=sides[0], heights_N=sides[1])
    b = p.batch(np.arange(5000), 32)
    shapes = np.stack([p.heights_N[b.ids_B], p.widths_N[b.ids_B]], axis=1)
    assert (b.window_starts_B2 >= 0).all()
    assert (b.window_shapes_B2 > 0).all()
    assert (b.window_starts_B2 + b.window_shapes_B2 <= shapes).all()
    area = b.window_shapes_B2.prod(axis=1) / shapes.prod(axis=1)
    assert 0.078 < area.min() < 0.09
    assert 0.9 < area.max() <= 1
    ratio = b.window_shapes_B2[:, 1] / b.window_shapes_B2[:, 0]
    assert 0.73 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.36
    assert 0.45 < b.flips_B.mean() < 0.55


def test_crops_are_distributed_as_torchvisions():
    n = 4000
    p = plan(n, widths_N=np.full(n, 500), heights_N=np.full(n, 375))
    b = p.batch(np.arange(n), 32)
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    crop = v2.RandomResizedCrop(32)
    theirs = [crop.make_params([image]) for _ in range(n)]
    pairs = {
        "top": (b.window_starts_B2[:, 0], [t["top"] for t in theirs]),
        "left": (b.window_starts_B2[:, 1], [t["left"] for t in theirs]),
        "height": (b.window_shapes_B2[:, 0], [t["height"] for t in theirs]),
        "width": (b.window_shapes_B2[:, 1], [t["width"] for t in theirs]),
    }
    for name, (ours, other) in pairs.items():
        grid = np.arange(501)
        distance = np.abs(cdf(ours, grid) - cdf(other, grid)).max()  # Kolmogorov-Smirnov
        assert distance < 1.95 * np.sqrt(2 / n), name  # p = 0.001


def cdf(values: object, grid: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(values), grid, side="right") / len(values)


@pytest.mark.parametrize(("width", "height", "window"), [(1000, 10, (10, 13)), (10, 1000, (13, 10))])
def test_images_without_a_fitting_attempt_get_the_largest_centered_window(width, height, window):
    b = plan(1, widths_N=np.array([width]), heights_N=np.array([height]), scale=(0.9, 1.0)).batch(np.arange(1), 32)
    assert tuple(b.window_shapes_B2[0]) == window
    assert tuple(b.window_starts_B2[0]) == ((height - window[0]) // 2, (width - window[1]) // 2)


def test_sides_of_32_bits_give_the_same_plan():
    sides = np.random.default_rng(1).integers(40_000, 65_500, (2, 50))  # areas exceed 32 bits
    wide, narrow = (
        plan(50, widths_N=sides_2N[0], heights_N=sides_2N[1]).batch(np.arange(50), 32)
        for sides_2N in (sides, sides.astype(np.int32))
    )
    assert np.array_equal(wide.window_shapes_B2, narrow.window_shapes_B2)
    wide, narrow = (
        EvalPlan(*sides_2N, 40_000, 32).batch(np.arange(50)) for sides_2N in (sides, sides.astype(np.int32))
    )
    assert np.array_equal(wide.sizes_B2, narrow.sizes_B2)


def test_replacements_are_any_samples_or_those_of_the_window():
    first_rows_S1 = np.arange(0, 101, 10)
    full, windowed = plan(100), plan(100, first_rows_S1=first_rows_S1, window=2)
    sample = int(windowed.locate(np.array([100]))[1][0])
    window = windowed.locate(np.arange(100, 120))[1]
    assert len(set(full.replacements(1, sample)) - set(window.tolist())) > 10
    candidates = list(windowed.replacements(1, sample))
    assert len(candidates) == 32
    assert set(candidates) <= set(window.tolist())
    assert len({candidate // 10 for candidate in candidates}) == 2, "of both shards"


def test_eval_sizes_and_origins_follow_torchvisions_rule():
    rng = np.random.default_rng(1)
    widths, heights = rng.integers(20, 600, 200), rng.integers(20, 600, 200)
    b = EvalPlan(widths, heights, resize=64, crop=51).batch(np.arange(200))
    for i in range(200):
        image = torch.zeros(1, int(heights[i]), int(widths[i]), dtype=torch.uint8)
        resized = v2.functional.resize(image, [64])
        assert tuple(b.sizes_B2[i]) == tuple(resized.shape[1:])
        h, w = resized.shape[1:]
        assert tuple(b.origins_B2[i]) == (round((h - 51) / 2.0), round((w - 51) / 2.0))


@pytest.mark.parametrize(("workers", "device_batch", "grad_accum"), [(1, 24, 1), (2, 4, 3), (3, 8, 1), (4, 2, 3)])
def test_micro_batches_fill_the_global_batch(workers, device_batch, grad_accum):
    positions = [
        micro_batch(5, micro, rank, workers, device_batch, grad_accum)
        for micro in range(grad_accum)
        for rank in range(workers)
    ]
    assert np.concatenate(positions).tolist() == list(range(5 * 24, 6 * 24))


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_evaluation_batches_of_all_ranks_have_every_id_once(workers):
    by_rank = [np.concatenate(list(rank_eval_batches(103, rank, workers, 8))) for rank in range(workers)]
    assert sorted(np.concatenate(by_rank)) == list(range(103))
    assert max(map(len, by_rank)) - min(map(len, by_rank)) <= 1


def test_with_more_ranks_than_samples_some_ranks_have_none():
    assert [len(list(rank_eval_batches(2, rank, 4, 8))) for rank in range(4)] == [0, 1, 0, 1]
