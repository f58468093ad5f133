"""The order of an epoch, next to its peer: sorting all samples by random keys, as PyTorch's `randperm` does."""

import tracemalloc
from collections.abc import Callable

import numpy as np

from pipeline.data.order import FullOrder
from pipeline.data.philox import SHUFFLE, Ints, philox

BATCH, PART = 256, 1 << 14  # samples of a batch; samples whose numbers fit the CPU's cache


def first_batch(num_samples: int, epoch: int) -> Ints:
    """Returns the first batch of an epoch."""
    return FullOrder(0, num_samples).ids(epoch, np.arange(BATCH))


def whole_order(num_samples: int, epoch: int) -> None:
    """Computes the order of a whole epoch, part by part."""
    order = FullOrder(0, num_samples)
    for start in range(0, num_samples, PART):
        order.ids(epoch, np.arange(start, min(start + PART, num_samples)))


def sorted_order(num_samples: int, epoch: int) -> Ints:
    """Returns a permutation by sorting 64-bit keys: the sample in the lowest bits, random bits above."""
    keys_N = np.empty(num_samples, np.uint64)
    for start in range(0, num_samples, PART):
        ids_P = np.arange(start, min(start + PART, num_samples), dtype=np.uint64)
        words_4P = philox((ids_P, *(np.array(value, np.uint64) for value in (epoch, 0, SHUFFLE))), 0)
        keys_N[start : start + len(ids_P)] = words_4P[0] << np.uint64(32) | words_4P[1]
    low = np.uint64((1 << max(1, (num_samples - 1).bit_length())) - 1)
    keys_N &= ~low
    keys_N |= np.arange(num_samples, dtype=np.uint64)
    keys_N.sort()
    keys_N &= low
    return keys_N.view(np.int64)


def peak_memory(function: Callable[[], object]) -> int:
    """Returns the most bytes that a function allocates at a time."""
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak
