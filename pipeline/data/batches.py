"""The samplers, loaders and batches of a config, for any training loop."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.config_fields import Device
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, PlannedBatch, TrainPlan
from pipeline.data.streaming.cache import ShardCache
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.dali import Batch, Loader


class Batches:
    """An iterator of batches, with a length. Threads prefetch the next batches while the loop uses the current one.

    Resources are freed at the end of the loop; after an early exit, by `close`, by a `with` block around the loop, or
    when the last reference is gone. `skipped` has the corrupt images replaced so far (`data.on_corrupt=skip`), with
    the reason, by row in the index.
    """

    def __init__(
        self,
        index: DatasetIndex,
        create_loader: Callable[[DatasetIndex], "Loader"],
        planned: Iterator[PlannedBatch],
        count: int,
        create_cache: "Callable[[], ShardCache] | None" = None,
    ) -> None:
        self.skipped: dict[int, str] = {}
        self._count = count
        self._batches = _run(index, create_loader, planned, self.skipped, create_cache)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> "Batch":
        return next(self._batches)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads and frees memory; ends the iteration."""
        self._batches.close()


def _run(
    index: DatasetIndex,
    create_loader: Callable[[DatasetIndex], "Loader"],
    planned: Iterator[PlannedBatch],
    skipped: dict[int, str],
    create_cache: "Callable[[], ShardCache] | None",
) -> Generator["Batch"]:
    """Runs a loader that lives as long as this generator; there is no reference cycle, so `del` closes it."""
    with ExitStack() as stack:
        if create_cache is not None:
            cache = stack.enter_context(create_cache())
            index, planned = cache.readable(index), cache.follow(planned)
        loader = stack.enter_context(create_loader(index))
        if create_cache is not None:
            stack.callback(cache.close)  # before the loader, which waits for its threads
        for batch in loader.run(planned):
            skipped.update(loader.skipped)
            yield batch


def train_plan(config: RunConfig, index: DatasetIndex, seed: int | None = None) -> TrainPlan:
    """Creates the training sampler of a config; `seed` defaults to the config's.

    Raises:
        UserError: the config requests the windowed shuffle, but there are no shards.
    """
    data = config.data
    if data.shuffle == "windowed" and not index.shards:
        raise UserError("data.shuffle=windowed shuffles within windows of shards, and there are none: use full.")
    return TrainPlan(
        seed=config.run.seed if seed is None else seed,
        widths_N=index.widths_N,
        heights_N=index.heights_N,
        scale=data.scale,
        ratio=data.ratio,
        hflip=data.hflip,
        first_rows_S1=index.first_rows_S1 if data.shuffle == "windowed" else None,
        window=data.window,
        augment=config.augment,
    )


def eval_plan(config: RunConfig, index: DatasetIndex, crop: int | None = None) -> EvalPlan:
    """Creates the evaluation sampler of a config; another `crop` keeps its ratio to the resize."""
    resize = config.eval.resize if crop is None else int(crop * config.eval.resize / config.eval.crop)
    return EvalPlan(index.widths_N, index.heights_N, resize, crop or config.eval.crop)


def create_loader(
    config: RunConfig, batch_size: int, device: Device, sampler: TrainPlan | None, index: DatasetIndex
) -> "Loader":
    """Creates a loader for training with `sampler`; without it, for evaluation."""
    from pipeline.data.dali import Loader

    data, device_id = config.data, None
    if device == "cuda":
        import torch

        device_id = torch.cuda.current_device()
    return Loader(
        index,
        device=device,
        device_id=device_id,
        threads=len(os.sched_getaffinity(0)) if data.threads == "auto" else data.threads,
        readers=data.readers,
        max_batch_size=batch_size,
        interpolation=data.interpolation if sampler is not None else config.eval.interpolation,
        mean=data.mean,
        std=data.std,
        augment=config.augment if sampler is not None else None,
        replacement_plan=sampler if data.on_corrupt == "skip" else None,
        channels=config.model.in_chans,
        num_classes=config.model.num_classes,
    )
