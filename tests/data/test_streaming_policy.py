"""The cache's policy: needs against a search through the epochs, and simulations of ranks that read at any speed."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import WindowedOrder
from pipeline.data.streaming.policy import NEVER, NO_SHARD, UNKNOWN, Need, next_uses, plan_actions, prioritize

RUNS = st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 40), st.integers(1, 3))
SAMPLES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def new_order(samples: list[int], window: int, seed: int) -> WindowedOrder:
    return WindowedOrder(seed, np.append(0, np.cumsum(samples)), window)


@given(SAMPLES, st.integers(1, 13), st.integers(0, 3), st.integers(0, 300), st.integers(0, 300))
def test_the_next_use_is_the_first_window_that_has_the_shard_and_is_not_over(samples, window, seed, position, stop):
    order, total = new_order(samples, window, seed), sum(samples)
    expected = dict.fromkeys(range(len(samples)), NEVER)
    for epoch in range(position // total + 2, -1, -1):
        windows = order.windows(epoch)
        for w in reversed(range(len(windows))):
            first, end = (epoch * total + int(offset) for offset in windows.first_offsets_W1[w : w + 2])
            if first < stop and end > position and position < stop:
                expected |= dict.fromkeys(windows.shards(w).tolist(), max(0, first - position))
    assert next_uses(order, position, stop).tolist() == list(expected.values())


def test_a_rank_that_has_not_started_needs_only_the_shard_that_it_waits_for():
    need = Need(new_order([3, 3, 3], 1, 0), UNKNOWN, 100)
    assert (prioritize([need], 3).uses_S == NEVER).all()
    assert prioritize([replace(need, demand=2)], 3).uses_S.tolist() == [NEVER, NEVER, 0]


class Node:
    """A simulated node: ranks of several runs, which read sample by sample, and shards that arrive in any order."""

    def __init__(self, runs: list[list[Need]], bytes_S: list[int], limit: int, seed: int) -> None:
        self.needs = [need for run in runs for need in run]
        self.bytes_S, self.limit, self.random = np.array(bytes_S, np.int64), limit, random.Random(seed)
        self.present_S, self.fetching_S = np.zeros(len(bytes_S), bool), np.zeros(len(bytes_S), bool)
        self.fetched = 0

    def step(self) -> bool:
        """Evicts, starts fetches, lets one shard arrive, and moves the ranks; returns whether anything happened."""
        return self.fetch() | any([self._read(i) for i in range(len(self.needs))])

    def fetch(self) -> bool:
        """Evicts, starts fetches and lets one shard arrive; returns whether one did."""
        current_S = prioritize(self.needs, len(self.bytes_S)).uses_S == 0
        all_fit = self.bytes_S[current_S].sum() <= self.limit
        nothing_S = np.zeros(len(self.bytes_S), bool)
        actions = plan_actions(
            prioritize(self.needs, len(self.bytes_S)),
            self.bytes_S,
            self.present_S,
            self.fetching_S,
            nothing_S,
            self.limit,
            8 - int(self.fetching_S.sum()),
        )
        assert not (all_fit and current_S[actions.evict].any()), "the shards that are read stay"
        self.present_S[actions.evict] = False
        self.fetching_S[actions.fetch] = True
        self.fetched += len(actions.fetch)
        assert self.bytes_S[self.present_S | self.fetching_S].sum() <= self.limit
        arrived = np.flatnonzero(self.fetching_S).tolist()
        if arrived:
            shard = self.random.choice(arrived)
            self.fetching_S[shard], self.present_S[shard] = False, True
        return bool(arrived)

    def _read(self, i: int) -> bool:
        """Lets a rank read its next samples, if their shard is there; otherwise it waits for it."""
        need = self.needs[i]
        if need.position >= need.stop:
            return False
        epoch, offset = divmod(need.position, int(need.order.first_rows_S1[-1]))
        windows = need.order.windows(epoch)
        window = need.order.window_of(epoch, offset)
        shard = random.Random(need.position).choice(windows.shards(window).tolist())
        if not self.present_S[shard]:
            self.needs[i] = replace(need, demand=shard)
            return need.demand != shard
        self.needs[i] = replace(need, position=need.position + self.random.randint(1, 3), demand=NO_SHARD)
        return True


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=12),
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=3
    ),
    st.integers(0, 100),
    st.integers(0, 2**20),
)
def test_any_runs_end_and_the_shards_never_exceed_the_limit(shards, runs, spare, seed):
    """The limit is enough for two windows of each run alone, not of all runs together."""
    samples, bytes_S = zip(*shards, strict=True)
    needs, limit = [], 0
    for run_seed, window, position, ranks in runs:
        order = new_order(list(samples), window, run_seed)
        limit = max(limit, sum(sorted(bytes_S)[-2 * window :]))
        needs.append([Need(order, position, position + 2 * sum(samples)) for _ in range(ranks)])
    node = Node(needs, list(bytes_S), limit + spare, seed)
    while any(need.position < need.stop for need in node.needs):
        assert node.step(), "every step makes progress"


@pytest.mark.parametrize("part", [1 / 4, 1 / 2])
def test_an_epoch_reads_as_many_shards_from_the_cache_as_the_optimum(part):
    """With shards in random order, the optimum is the cache's part of the data."""
    count, window, samples = 240, 8, 4
    order = new_order([samples] * count, window, seed=5)
    need = Need(order, 0, 12 * count * samples)
    node = Node([[need]], [1] * count, round(part * count), seed=0)
    fetched = []
    for epoch in range(10):
        before = node.fetched
        for w in range(count // window):
            node.needs = [replace(need, position=(epoch * count + w * window) * samples)]
            while node.fetch():
                pass
        fetched.append((node.fetched - before) / count)
    assert fetched[0] == pytest.approx(1, abs=0.05)
    assert np.mean(fetched[2:]) == pytest.approx(1 - part, abs=0.02)


def test_everything_stays_if_it_fits():
    order = new_order([5] * 20, 2, seed=1)
    node = Node([[Need(order, 0, 5 * 100)]], [10] * 20, limit=200, seed=3)
    while node.needs[0].position < 500:
        assert node.step()
    assert node.fetched == 20
