"""Counter-based random numbers (Philox): a pure function of seed, epoch, sample and purpose."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10

# Purposes of random words: the last word of the counter.
SHUFFLE, CROP, COLOR, AUTO_AUGMENT, ERASE, MIX, SHUFFLE_SHARDS, REPLACE, PLUGIN = range(9)


def philox(counters_4: tuple[NDArray[np.uint64], ...], seed: int) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), vectorized.

    Implemented here so that a run's sample order does not depend on a library's version.

    Args:
        counters_4: four broadcastable arrays, values below 2**32.
        seed: the key, below 2**64.

    Returns:
        Random words below 2**32, shape [4, *broadcast shape], uint64.
    """
    c0, c1, c2, c3 = (np.array(c, np.uint64) for c in np.broadcast_arrays(*counters_4))
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(_ROUNDS):
        np.multiply(c0, _M0, out=p0)
        np.multiply(c2, _M1, out=p1)
        # c0, c1, c2, c3 = high(p1) ^ c1 ^ k0, low(p1), high(p0) ^ c3 ^ k1, low(p0), in place
        np.right_shift(p1, _SHIFT, out=c0)
        c0 ^= c1
        c0 ^= k0
        np.right_shift(p0, _SHIFT, out=c2)
        c2 ^= c3
        c2 ^= k1
        np.bitwise_and(p1, _LOW, out=c1)
        np.bitwise_and(p0, _LOW, out=c3)
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Converts words below 2**32 to uniform floats in [0, 1)."""
    return words.astype(np.float64) * 2.0**-32


def draw(seed: int, epochs_B: Ints, ids_B: Ints, counts: dict[int, int]) -> dict[int, NDArray[np.float64]]:
    """Draws uniform numbers in [0, 1) for each (epoch, sample): four per purpose and draw.

    Args:
        counts: number of draws for each purpose; one call for all purposes is fastest.

    Returns:
        For each purpose an array of shape [4, B, counts[purpose]].
    """
    counters = (
        ids_B.astype(np.uint64)[:, None],
        epochs_B.astype(np.uint64)[:, None],
        np.concatenate([np.arange(count, dtype=np.uint64) for count in counts.values()]),
        np.repeat(np.fromiter(counts, np.uint64), list(counts.values())),
    )
    u_4BT = uniform(philox(counters, seed))
    ends = np.cumsum(list(counts.values())).tolist()
    return {purpose: u_4BT[..., end - counts[purpose] : end] for purpose, end in zip(counts, ends, strict=True)}
