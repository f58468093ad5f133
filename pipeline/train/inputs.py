"""A rank's data: the training and evaluation plans (samplers) and their loaders."""

from collections.abc import Generator, Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.config import RunConfig
from pipeline.config_data import Augment
from pipeline.config_fields import Interpolation
from pipeline.data.batches import eval_plan, train_plan
from pipeline.data.dali import Batch, Loader
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import PlannedBatch, TrainPlan, micro_batch
from pipeline.data.streaming.cache import open_cache
from pipeline.data.streaming.limits import shard_bytes
from pipeline.derived import Derived


class Inputs:
    """A rank's micro-batches of the training split, and the evaluation split's loader and plan.

    Call `close` at the end.
    """

    def __init__(
        self,
        config: RunConfig,
        derived: Derived,
        train_index: DatasetIndex,
        val_index: DatasetIndex,
        device: torch.device,
    ) -> None:
        data = config.data
        self._config, self._derived, self._device = config, derived, device
        self._cache = None
        if data.streams:
            self._cache = open_cache(
                data,
                config.run.seed,
                train_index,
                shard_bytes(val_index),
                stop=derived.total_samples,
                hang_timeout_s=config.cluster.hang_timeout_s,
            )
            train_index = self._cache.readable(train_index)
        self.train_index = train_index
        self.plan = train_plan(config, train_index)
        self.eval_plan = eval_plan(config, val_index)
        self.loader = self._loader(
            train_index,
            derived.device_batch_size,
            data.interpolation,
            augment=config.augment,
            replacement_plan=self.plan if data.on_corrupt == "skip" else None,
        )
        self.eval_loader = self._loader(val_index, derived.eval_batch_size, config.eval.interpolation)
        self._reported = 0  # skipped samples

    def close(self) -> None:
        """Closes both loaders; first ends their waits for shards."""
        if self._cache is not None:
            self._cache.close()
        self.eval_loader.close()
        self.loader.close()

    def batches(self, first_step: int) -> Generator[Batch]:
        """Yields this rank's micro-batches from `first_step` (counted from 0) to the end of the run."""
        planned = self._planned(first_step)
        return self.loader.run(planned if self._cache is None else self._cache.follow(planned))

    def images(self, step: int) -> list[str]:
        """Returns this rank's images in a step (counted from 0), as paths, or shard and member."""
        positions = np.concatenate(
            [self._positions(step, micro) for micro in range(self._derived.gradient_accumulation_steps)]
        )
        return [self.train_index.describe(sample) for sample in self.plan.locate(positions)[1]]

    def newly_skipped(self) -> Iterator[tuple[int, str]]:
        """Yields corrupt training images that were replaced since the last call: sample and problem."""
        for sample in list(self.loader.skipped)[self._reported :]:
            self._reported += 1
            yield sample, self.loader.skipped[sample]

    def _positions(self, step: int, micro: int) -> NDArray[np.int64]:
        d = self._derived
        return micro_batch(step, micro, dist.get_rank(), d.workers, d.device_batch_size, d.gradient_accumulation_steps)

    def _planned(self, first_step: int) -> Iterator[PlannedBatch]:
        d = self._derived
        for step in range(first_step, d.total_steps):
            side = self._config.data.image_size_at(step * d.global_batch_size / d.train_samples)
            for micro in range(d.gradient_accumulation_steps):
                yield self.plan.batch(self._positions(step, micro), side)

    def _loader(
        self,
        index: DatasetIndex,
        batch_size: int,
        interpolation: Interpolation,
        augment: Augment | None = None,
        replacement_plan: TrainPlan | None = None,
    ) -> Loader:
        data, derived = self._config.data, self._derived
        return Loader(
            index,
            device=derived.device,
            device_id=self._device.index if derived.device == "cuda" else None,
            threads=derived.cpus_per_worker if data.threads == "auto" else data.threads,
            readers=data.readers,
            max_batch_size=batch_size,
            interpolation=interpolation,
            mean=data.mean,
            std=data.std,
            augment=augment,
            replacement_plan=replacement_plan,
            channels=self._config.model.in_chans,
            num_classes=derived.num_classes,
        )
