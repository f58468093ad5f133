"""The order of an epoch: every sample once, with the statistics of a sort by random keys.

Each statistic is also computed for networks of fewer rounds, and must find them. Seeds are fixed.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.data.order import (
    ROUNDS,
    SORTED,
    FeistelPermutation,
    FullOrder,
    WindowedOrder,
    permutation,
    sorted_permutation,
)
from pipeline.data.philox import philox

A, B = 64, 65  # positions and samples are A * B: none leaves the range, so that nothing hides a network's structure
SIZE, EPOCHS = A * B, 200
POSITIONS_N = np.arange(SIZE)
ACCEPTED = 1e-4  # the lowest p-value of a correct order; 30 such values are computed
FOUND = 1e-9  # the highest of a wrong one

QUICK = settings(max_examples=60)
seeds = st.integers(0, 2**64 - 1)

Statistic = Callable[[np.ndarray], float]


def words(seed: int, epoch: int, count: int) -> np.ndarray:
    counters = (np.arange(-(-count // 4), dtype=np.uint64), *(np.array(x, np.uint64) for x in (epoch, 0, 99)))
    return philox(counters, seed).ravel()[:count]


def one_round(seed: int, epoch: int, count: int) -> np.ndarray:
    """Words with which the first of two rounds adds 0."""
    values = words(seed, epoch, count)
    values[:B] = 0
    return values


@cache
def orders(rounds: int) -> np.ndarray:
    """Returns epochs' orders [E, N]: this project's, sorted by random keys (0 rounds), or of fewer rounds."""
    if rounds == ROUNDS:
        return np.stack([permutation(1, epoch, SIZE)(POSITIONS_N) for epoch in range(EPOCHS)])
    if rounds == 0:
        return np.stack([sorted_permutation(SIZE, partial(words, 1, e))(POSITIONS_N) for e in range(EPOCHS)])
    source = one_round if rounds == 1 else words
    return np.stack(
        [FeistelPermutation(SIZE, partial(source, 1, epoch), max(2, rounds))(POSITIONS_N) for epoch in range(EPOCHS)]
    )


def normal(z: float) -> float:
    """Returns the two-sided p-value of a normal variable."""
    return float(2 * stats.norm.sf(abs(z)))


def joint(labels: Callable[[np.ndarray], np.ndarray], others: Callable[[np.ndarray], np.ndarray]) -> Statistic:
    """Returns a chi-square test of labels of positions against labels of their samples, summed over the epochs."""

    def p_value(orders_EN: np.ndarray) -> float:
        return independence(labels(POSITIONS_N)[None].repeat(len(orders_EN), axis=0), others(orders_EN))

    return p_value


def independence(first_EN: np.ndarray, second_EN: np.ndarray) -> float:
    """Returns the p-value of chi-square tests of two labels from 0, summed over epochs."""
    total = freedom = 0.0
    for first_N, second_N in zip(first_EN, second_EN, strict=True):
        counts = np.zeros((first_N.max() + 1, second_N.max() + 1))
        np.add.at(counts, (first_N, second_N), 1)
        expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / SIZE
        total += ((counts - expected) ** 2 / expected).sum()
        freedom += (counts.shape[0] - 1) * (counts.shape[1] - 1)
    return normal((total - freedom * SIZE / (SIZE - 1)) / (2 * freedom) ** 0.5)


def over_epochs(orders_EN: np.ndarray) -> float:
    """Chi-square of l of the positions and of their samples in all epochs together."""
    counts = np.zeros((A, A))
    np.add.at(counts, (np.broadcast_to(POSITIONS_N // B, orders_EN.shape), orders_EN // B), 1)
    expected = orders_EN.size / A**2
    return float(stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), (A - 1) ** 2))


def difference(lag: int, orders_EN: np.ndarray) -> float:
    """Chi-square of the differences modulo N between samples `lag` positions apart."""
    bins = (orders_EN[:, lag:] - orders_EN[:, :-lag]) % SIZE * 40 // SIZE
    return float(stats.chisquare(np.bincount(bins.ravel(), minlength=40)).pvalue)


def serial_correlation(orders_EN: np.ndarray) -> float:
    """The largest correlation of samples 1 to 130 positions apart, whose mean is -1 / (N - 1)."""
    centered_EN = orders_EN - (SIZE - 1) / 2
    products_EN = np.fft.irfft(np.abs(np.fft.rfft(centered_EN)) ** 2)[:, 1:131]
    correlations = products_EN / (centered_EN**2).sum(axis=1, keepdims=True) + 1 / (SIZE - 1)
    z = correlations.sum(axis=0) * (SIZE / len(orders_EN)) ** 0.5
    return min(1.0, 130 * normal(np.abs(z).max()))


def fixed_points(orders_EN: np.ndarray) -> float:
    """Their number is Poisson with mean 1."""
    counts = np.bincount(np.minimum((orders_EN == POSITIONS_N).sum(axis=1), 4), minlength=5)
    expected = len(orders_EN) * np.append(stats.poisson.pmf(range(4), 1), stats.poisson.sf(3, 1))
    return float(stats.chisquare(counts, expected).pvalue)


def cycles(orders_EN: np.ndarray) -> np.ndarray:
    """Returns the number of cycles of each permutation."""
    graphs = (coo_array((np.ones(SIZE), (POSITIONS_N, order_N)), (SIZE, SIZE)) for order_N in orders_EN)
    return np.array([connected_components(graph)[0] for graph in graphs])


def number_of_cycles(orders_EN: np.ndarray) -> float:
    """Its mean is the sum of 1 / n up to N, and its variance that of 1 / n - 1 / n^2."""
    inverses = 1 / np.arange(1, SIZE + 1)
    deviation = (cycles(orders_EN) - inverses.sum()).sum()
    return normal(deviation / ((inverses - inverses**2).sum() * len(orders_EN)) ** 0.5)


def parity(orders_EN: np.ndarray) -> float:
    """Half of the permutations are even."""
    even = int(((SIZE - cycles(orders_EN)) % 2 == 0).sum())
    return float(stats.binomtest(even, len(orders_EN)).pvalue)


def same_shift(orders_EN: np.ndarray) -> float:
    """Pairs with equal r whose l change by the same amount (Patarin 2001, "Generic attacks on Feistel schemes")."""
    counts = []
    for order_N in orders_EN:
        same = np.bincount((order_N // B - POSITIONS_N // B) % A * B + POSITIONS_N % B)
        counts.append((same * (same - 1) // 2).sum())
    expected = B * A * (A - 1) / 2 * B / (SIZE - 1)
    return float(stats.ttest_1samp(counts, expected).pvalue)


STATISTICS: dict[str, tuple[Statistic, int]] = {  # each with the most rounds that it finds
    "l and l'": (joint(lambda x: x // B, lambda x: x // B), 1),
    "l and r'": (joint(lambda x: x // B, lambda x: x % B), 1),
    "r and l'": (joint(lambda x: x % B, lambda x: x // B), 2),
    "r and r'": (joint(lambda x: x % B, lambda x: x % B), 2),
    "16 parts": (joint(lambda x: x * 16 // SIZE, lambda x: x * 16 // SIZE), 2),
    "modulo 2": (joint(lambda x: x % 2, lambda x: x % 2), 1),
    "modulo 3": (joint(lambda x: x % 3, lambda x: x % 3), 1),
    "modulo 5": (joint(lambda x: x % 5, lambda x: x % 5), 4),
    "modulo 8": (joint(lambda x: x % 8, lambda x: x % 8), 1),
    "over epochs": (over_epochs, 1),
    "difference of neighbors": (partial(difference, 1), 2),
    "difference of every A-th": (partial(difference, A), 2),
    "difference of every B-th": (partial(difference, B), 4),
    "serial correlation": (serial_correlation, 4),
    "fixed points": (fixed_points, 2),
    "number of cycles": (number_of_cycles, 1),
    "parity": (parity, 1),
    "same shift": (same_shift, 6),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_an_order_has_the_statistics_of_a_sort_which_find_fewer_rounds(name):
    statistic, found = STATISTICS[name]
    assert SIZE > SORTED
    assert statistic(orders(0)) > ACCEPTED
    assert statistic(orders(ROUNDS)) > ACCEPTED
    assert found < ROUNDS and statistic(orders(found)) < FOUND


def related(first_EN: np.ndarray, second_EN: np.ndarray) -> float:
    """Returns the lowest p-value of: parts of two samples at the same position, and their difference."""
    parts = independence(first_EN * 16 // SIZE, second_EN * 16 // SIZE)
    bins = (second_EN - first_EN) % SIZE * 40 // SIZE
    return min(parts, float(stats.chisquare(np.bincount(bins.ravel(), minlength=40)).pvalue))


def test_orders_of_other_epochs_seeds_windows_and_purposes_are_independent():
    first_EN = orders(ROUNDS)[:50]

    def others(**changes: int) -> np.ndarray:
        arguments = ({"seed": 1, "epoch": epoch, "size": SIZE} | changes for epoch in range(50))
        return np.stack([permutation(**a)(POSITIONS_N) for a in arguments])

    assert related(first_EN, orders(ROUNDS)[1:51]) > ACCEPTED
    for changes in ({"seed": 0}, {"seed": 2}, {"seed": 1 + 2**32}, {"window": 1}, {"purpose": 1}):
        assert related(first_EN, others(**changes)) > ACCEPTED, changes
    assert related(first_EN, others()) < FOUND
    assert related(first_EN, (first_EN + 1000) % SIZE) < FOUND


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_all_permutations_of_few_samples_are_equally_likely(size):
    number = {order: i for i, order in enumerate(permutations(range(size)))}
    positions_N = np.arange(size)

    def p_value(create: Callable[[int], Callable[[np.ndarray], np.ndarray]], epochs: int) -> float:
        found = [number[tuple(create(epoch)(positions_N).tolist())] for epoch in range(epochs)]
        return float(stats.chisquare(np.bincount(found, minlength=len(number))).pvalue)

    assert p_value(lambda epoch: permutation(1, epoch, size), max(2500, 12 * len(number))) > ACCEPTED
    assert p_value(lambda epoch: FeistelPermutation(size, partial(words, 1, epoch), 2), 2500) < FOUND
    if size == 6:  # why few samples are sorted: of two by three elements, a network's bias halves only every two rounds
        assert p_value(lambda epoch: FeistelPermutation(size, partial(words, 1, epoch)), 8640) < FOUND


def test_every_size_up_to_2000_has_every_sample_once():
    for size in range(1, 2001):
        positions_N = np.arange(size)
        for shuffled in (permutation(3, 1, size), FeistelPermutation(size, partial(words, 3, 1))):
            assert np.array_equal(np.sort(shuffled(positions_N)), positions_N), size


@settings(max_examples=20)
@given(seed=seeds, epoch=st.integers(0, 2**32 - 1), size=st.integers(SORTED - 1, 2**20))
def test_an_epoch_has_every_sample_once_in_any_slices(seed, epoch, size):
    order = FullOrder(seed, size)
    ids_N = order.ids(epoch, np.arange(size))
    assert np.array_equal(np.sort(ids_N), np.arange(size))
    some_B = np.random.default_rng(0).integers(0, size, 100)
    assert np.array_equal(order.ids(epoch, some_B), ids_N[some_B])


def defined(position: int, a: int, b: int, words_RX: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """The network by its definition: in turn, additions modulo a and b of random numbers in [0, a) and [0, b)."""
    l, r = divmod(position, b)  # noqa: E741
    for f_X, g_X in words_RX:
        l = (l + (int(f_X[r]) * a >> 32)) % a  # noqa: E741
        r = (r + (int(g_X[l]) * b >> 32)) % b
    return l * b + r


@settings(max_examples=10)
@given(seed=seeds, size=st.integers(1, 40).flatmap(lambda bits: st.integers(2 ** (bits - 1), 2**bits)))
def test_a_network_is_that_of_its_definition_up_to_a_trillion_samples(seed, size):
    network = FeistelPermutation(size, partial(words, seed, 0))
    a, b = network._a, network._b
    assert a % 2 == 0 and 0 <= a * b - size < a <= size**0.5 + 2
    words_PX = words(seed, 0, ROUNDS // 2 * (a + b)).reshape(ROUNDS // 2, a + b)
    words_RX = [(w_X[:b], w_X[b:]) for w_X in words_PX]
    positions_B = np.random.default_rng(0).integers(0, size, 50)
    expected = []
    for position in positions_B.tolist():
        sample = defined(position, a, b, words_RX)
        while sample >= size:
            sample = defined(sample, a, b, words_RX)
        expected.append(sample)
    assert network(positions_B).tolist() == expected


@QUICK
@given(seed=seeds, sizes=st.lists(st.integers(0, 40), min_size=1, max_size=40), window=st.integers(1, 50))
def test_a_windowed_epoch_has_every_sample_once_and_its_windows_in_order(seed, sizes, window):
    first_rows_S1 = np.append(0, np.cumsum(sizes))
    order, total = WindowedOrder(seed, first_rows_S1, window), sum(sizes)
    windows = order.windows(3)
    ids_N = order.ids(3, np.arange(total))
    assert np.array_equal(np.sort(ids_N), np.arange(total))
    assert np.array_equal(np.sort(windows.shards_S), np.arange(len(sizes)))
    assert len(windows) == -(-len(sizes) // window)
    for number in range(len(windows)):
        first, end = windows.first_offsets_W1[number : number + 2]
        shards = windows.shards(number)
        rows = [row for shard in shards for row in range(first_rows_S1[shard], first_rows_S1[shard + 1])]
        assert sorted(ids_N[first:end]) == sorted(rows)
        assert len(shards) == window or number == len(windows) - 1
        assert all(order.window_of(3, offset) == number for offset in range(first, end))
        for sample in ids_N[first:end][:2].tolist():
            candidates = order.replacements(3, sample, np.array([0, 0.5, 1 - 2**-32]))
            assert set(candidates.tolist()) <= set(rows)


def test_windows_hold_other_shards_in_each_epoch_and_mix_their_samples():
    first_rows_S1 = np.arange(0, 40 * 2500 + 1, 2500)
    order = WindowedOrder(3, first_rows_S1, 5)
    groups = [{frozenset(order.windows(epoch).shards(w).tolist()) for w in range(8)} for epoch in range(2)]
    assert not groups[0] & groups[1]
    within = order.ids(0, np.arange(5 * 2500)) // 2500
    assert 0.78 < (np.diff(within) != 0).mean() < 0.82
    assert np.array_equal(order.ids(0, np.arange(1000)), WindowedOrder(3, first_rows_S1, 5).ids(0, np.arange(1000)))


def test_replacements_in_a_windowed_epoch_reach_all_samples_of_the_window():
    order = WindowedOrder(3, np.array([0, 3, 3, 10, 12, 20]), 2)
    for offset in range(20):
        first, end = order.windows(1).first_offsets_W1[order.window_of(1, offset) :][:2]
        candidates = order.replacements(
            1, int(order.ids(1, np.array([offset]))[0]), np.arange(end - first) / (end - first)
        )
        assert sorted(candidates) == sorted(order.ids(1, np.arange(first, end)))


def test_the_order_is_that_of_its_version():
    """Any other numbers need a new ORDER_VERSION."""
    offsets_B = np.array([0, 1, 2, 900_000, 1_281_166])
    windowed = WindowedOrder(5, np.append(np.arange(0, 1_281_167, 1165), 1_281_167), 16)
    assert FullOrder(5, 1_281_167).ids(57, offsets_B).tolist() == [214842, 156050, 376893, 202122, 131367]
    assert FullOrder(5, 12).ids(57, np.arange(12)).tolist() == [7, 9, 5, 10, 3, 1, 6, 11, 4, 2, 0, 8]
    assert windowed.ids(57, offsets_B).tolist() == [620182, 576090, 30841, 677736, 80273]
    assert windowed.windows(57).shards(0)[:5].tolist() == [965, 510, 1042, 863, 902]
