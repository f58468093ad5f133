"""The sample plan: random numbers, order, crops, shares."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipeline.data.plan import EvalPlan, TrainPlan, eval_share, micro_batch, philox


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
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
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


def test_every_sample_comes_once_per_epoch_in_another_order():
    p, n = plan(), 103
    epochs_B, ids_B = p.locate(np.arange(3 * n))
    assert epochs_B.tolist() == [0] * n + [1] * n + [2] * n
    orders = ids_B.reshape(3, n)
    for order in orders:
        assert sorted(order) == list(range(n))
    assert len({tuple(order) for order in orders.tolist()}) == 3


def test_the_order_depends_on_the_seed():
    assert plan().locate(np.arange(50))[1].tolist() != plan(seed=8).locate(np.arange(50))[1].tolist()


def test_a_sample_is_cropped_alike_however_it_is_reached():
    p = plan()
    whole = p.batch(np.arange(95, 115), 32)  # the end of one epoch and the start of the next
    for i in range(20):
        single = p.batch(np.array([95 + i]), 32)
        for name in ("ids_B", "window_starts_B2", "window_shapes_B2", "flips_B"):
            assert np.array_equal(getattr(single, name)[0], getattr(whole, name)[i]), name


def test_a_sample_is_cropped_and_flipped_anew_in_each_epoch():
    p, n = plan(), 103
    first, second = (p.batch(np.arange(epoch * n, (epoch + 1) * n), 32) for epoch in range(2))
    a, b = np.argsort(first.ids_B), np.argsort(second.ids_B)
    same_window = (first.window_shapes_B2[a] == second.window_shapes_B2[b]).all(axis=1)
    assert same_window.mean() < 0.1
    assert 0.3 < (first.flips_B[a] == second.flips_B[b]).mean() < 0.7


def test_windows_reach_every_place_that_they_fit():
    n = 2000
    b = plan(n, widths_N=np.full(n, 8), heights_N=np.full(n, 8)).batch(np.arange(n), 32)
    small = (b.window_shapes_B2 == 5).all(axis=1)
    for axis in range(2):
        assert set(b.window_starts_B2[small, axis].tolist()) == {0, 1, 2, 3}


def test_windows_lie_inside_and_keep_area_and_ratio():
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
    for name, (mine, other) in pairs.items():
        grid = np.arange(501)
        distance = np.abs(cdf(mine, grid) - cdf(other, grid)).max()  # Kolmogorov-Smirnov
        assert distance < 1.95 * np.sqrt(2 / n), name  # p = 0.001


def cdf(values: object, grid: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(values), grid, side="right") / len(values)


@pytest.mark.parametrize(("width", "height", "window"), [(1000, 10, (10, 13)), (10, 1000, (13, 10))])
def test_images_that_no_try_fits_get_the_largest_centered_window(width, height, window):
    b = plan(1, widths_N=np.array([width]), heights_N=np.array([height]), scale=(0.9, 1.0)).batch(np.arange(1), 32)
    assert tuple(b.window_shapes_B2[0]) == window
    assert tuple(b.window_starts_B2[0]) == ((height - window[0]) // 2, (width - window[1]) // 2)


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


@pytest.mark.parametrize(("workers", "device_batch", "accumulation"), [(1, 24, 1), (2, 4, 3), (3, 8, 1), (4, 2, 3)])
def test_micro_batches_fill_the_global_batch(workers, device_batch, accumulation):
    positions = [
        micro_batch(5, micro, rank, workers, device_batch, accumulation)
        for micro in range(accumulation)
        for rank in range(workers)
    ]
    assert np.concatenate(positions).tolist() == list(range(5 * 24, 6 * 24))


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_eval_shares_hold_every_id_once(workers):
    shares = [np.concatenate(list(eval_share(103, rank, workers, 8))) for rank in range(workers)]
    assert sorted(np.concatenate(shares)) == list(range(103))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_samples_leave_some_without():
    assert [len(list(eval_share(2, rank, 4, 8))) for rank in range(4)] == [0, 1, 0, 1]
