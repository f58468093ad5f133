"""Which shards a node's cache fetches and evicts: arithmetic on what its ranks will read.

The future is known, so the optimal policy is possible (Belady 1966): evict what is needed last. Needs have a strict
order: first by the number of samples until the shard's window starts, then by the age of the rank. A shard is fetched
only in place of shards that are needed later than it. So if the current windows of all ranks fit the limit, none of
their shards is evicted; if not, the oldest ranks still progress, and there is no deadlock.

Shards are fetched into free space as early as possible, but others are evicted only for shards that are needed soon:
those that are read now, and the next ones, up to half the limit or to as many bytes as are read now. The rest keeps
what the next epoch needs first. With a cache of a third of the data, a third of each epoch is read from it, as in the
optimum; without this bound it is a tenth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order import WindowedOrder
from pipeline.data.philox import Ints

NEVER = int(np.iinfo(np.int64).max)
NO_SHARD = -1
UNKNOWN = -1  # the position of a rank that has not started to read


@dataclass(frozen=True)
class Need:
    """What one rank will read.

    Attributes:
        order: Its epochs' windows.
        position: The first position of the run's sample order that it may still read, or `UNKNOWN`.
        stop: Position at which its run ends.
        demand: The shard that it waits for, or `NO_SHARD`.
    """

    order: WindowedOrder
    position: int
    stop: int
    demand: int = NO_SHARD

    @property
    def window(self) -> int:
        """The number of the window at the position, counted from the start of the run; or `UNKNOWN`, or `NEVER`."""
        if not 0 <= self.position < self.stop:
            return UNKNOWN if self.position < 0 else NEVER
        epoch, offset = divmod(self.position, int(self.order.first_rows_S1[-1]))
        return epoch * len(self.order.windows(epoch)) + self.order.window_of(epoch, offset)


@dataclass(frozen=True, eq=False)
class Priorities:
    """When each shard is needed.

    Attributes:
        shards_S: All shards, the one that is needed first at the front.
        uses_S: For each shard the number of samples until its window starts; 0: it is being read; `NEVER`.
    """

    shards_S: Ints
    uses_S: Ints


@dataclass(frozen=True)
class Actions:
    """Shards to evict, and then to fetch, in order."""

    evict: list[int]
    fetch: list[int]


def next_uses(order: WindowedOrder, position: int, stop: int) -> Ints:
    """Returns for each shard the number of samples from `position` until the window that needs it starts.

    0: the window at the position; `NEVER`: not before `stop`. Shape [S], int64.
    """
    num_shards, samples = len(order.first_rows_S1) - 1, int(order.first_rows_S1[-1])
    uses_S = np.full(num_shards, NEVER)
    if not 0 <= position < stop:
        return uses_S
    epoch = position // samples
    for later in (epoch + 1, epoch):  # an earlier use replaces the later one
        windows = order.windows(later)
        starts_W, ends_W = (
            later * samples + windows.first_offsets_W1[:-1],
            later * samples + windows.first_offsets_W1[1:],
        )
        is_read_W = (ends_W > position) & (starts_W < stop)
        windows_S = np.arange(num_shards) // windows.size
        is_read_S = is_read_W[windows_S]
        uses_S[windows.shards_S[is_read_S]] = np.maximum(starts_W - position, 0)[windows_S[is_read_S]]
    return uses_S


def prioritize(needs: Sequence[Need], num_shards: int) -> Priorities:
    """Orders all shards by when the ranks need them; `needs` starts with the oldest rank."""
    uses_S, ages_S = np.full(num_shards, NEVER), np.zeros(num_shards, np.int64)
    is_demanded_S = np.zeros(num_shards, bool)
    for age, need in enumerate(needs):
        own_S = next_uses(need.order, need.position, need.stop)
        if need.demand != NO_SHARD:
            own_S[need.demand] = 0
        sooner_S = own_S < uses_S
        uses_S[sooner_S], ages_S[sooner_S] = own_S[sooner_S], age
        if need.demand != NO_SHARD and sooner_S[need.demand]:
            is_demanded_S[need.demand] = True
    return Priorities(np.lexsort((~is_demanded_S, ages_S, uses_S)), uses_S)


def plan_actions(
    priorities: Priorities,
    bytes_S: Ints,
    present_S: NDArray[np.bool_],
    fetching_S: NDArray[np.bool_],
    postponed_S: NDArray[np.bool_],
    limit: int,
    slots: int,
) -> Actions:
    """Returns what to evict and what to fetch, so that present shards and those being fetched fit the limit.

    Args:
        priorities: When each shard is needed.
        bytes_S: The shards' sizes.
        present_S: Which shards are on disk.
        fetching_S: Which shards are being fetched; they count with their full size, and are not evicted.
        postponed_S: Which shards are not fetched at the moment, because that failed.
        limit: Bytes.
        slots: Number of shards that can be fetched in addition.
    """
    shards_R = priorities.shards_S  # R: ranks in the order of need
    bytes_R, uses_R, present_R = bytes_S[shards_R], priorities.uses_S[shards_R], present_S[shards_R]
    read_now = int(bytes_R[uses_R == 0].sum())
    is_soon_R = np.cumsum(bytes_R) <= max(limit // 2, 2 * read_now)
    is_missing_R = ~(present_R | fetching_S[shards_R] | postponed_S[shards_R]) & (uses_R < NEVER)
    used = int(bytes_S[present_S | fetching_S].sum())
    evictable = np.flatnonzero(present_R).tolist()  # the last one is needed last
    evict, fetch = [], []
    while used > limit and evictable:  # the limit has become smaller
        used -= int(bytes_R[evictable[-1]])
        evict.append(evictable.pop())
    for missing in np.flatnonzero(is_missing_R)[:slots].tolist():
        free, victims = limit - used, []
        while free < bytes_R[missing] and is_soon_R[missing] and evictable and evictable[-1] > missing:
            free += int(bytes_R[evictable[-1]])
            victims.append(evictable.pop())
        if free < bytes_R[missing]:
            break
        used = limit - free + int(bytes_R[missing])
        evict += victims
        fetch.append(missing)
    return Actions(shards_R[evict].tolist(), shards_R[fetch].tolist())
