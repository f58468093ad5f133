"""Shards in a cache of limited size on each node's disk: fetched before the sampler needs them, and evicted after.

The order of training is a function of (seed, epoch, position), so what each rank needs next is known (`policy`). Ranks
register in a folder and publish their positions (`folder`, `cache`); one process per node fetches and evicts for all of
them (`fetcher`, `download`).
"""
