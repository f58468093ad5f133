"""The training loop of one rank."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.config import Augment, Interpolation, RunConfig
from pipeline.data.dali import Batch, Loader
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, PlannedBatch, TrainPlan, micro_batch
from pipeline.derived import Derived
from pipeline.errors import UserError
from pipeline.model import create
from pipeline.model.weights import NO_SOURCES, Sources, load_teacher, load_weights
from pipeline.train.engine import Engine
from pipeline.train.evaluate import EvalResult, Forward, evaluate
from pipeline.train.loss import Criterion
from pipeline.train.meter import Meter
from pipeline.train.schedule import learning_rate
from pipeline.train.state import RunState, Weights, restore, save

Report = Callable[[dict[str, Any]], None]


class Trainer:
    """Trains one model on one rank of a process group that exists already.

    `report` receives events (dicts with a `kind`); it must return at once. Those of rank 0 count; but every rank tells
    of the damaged training pictures that it met and replaced (`skipped`). `sources` are the weights to start from and
    the teacher, where the config asks for them.
    """

    def __init__(
        self,
        config: RunConfig,
        derived: Derived,
        train_index: DatasetIndex,
        val_index: DatasetIndex,
        run_dir: Path,
        device: torch.device,
        report: Report,
        sources: Sources = NO_SOURCES,
    ) -> None:
        self.config, self.derived, self.run_dir, self.device, self.report = config, derived, run_dir, device, report
        self.classes = train_index.classes
        self.rank = dist.get_rank()
        torch.manual_seed(config.run.seed)
        model = create(config.model, derived.num_classes)
        if sources.weights is not None:
            load_weights(model, sources.weights)
        self.engine = Engine(config, derived, model, device, self._warn)
        teacher = None
        if sources.teacher is not None:
            model = load_teacher(sources.teacher, self.classes, config.model.in_chans).to(device)
            teacher = partial(self.engine.infer, model)
        self.criterion = Criterion(
            config.loss,
            derived.num_classes,
            teacher,
        )
        self._drops = config.model.drop_rate > 0 or config.model.layer_drop_rate > 0
        data = config.data
        self.plan = TrainPlan(
            seed=config.run.seed,
            widths_N=train_index.widths_N,
            heights_N=train_index.heights_N,
            crop_area=data.crop_area,
            crop_ratio=data.crop_ratio,
            flip=data.flip,
            files_N=train_index.files_N if data.shuffle == "windowed" else None,
            window=data.window,
            augment=config.augment,
        )
        self.eval_plan = EvalPlan(val_index.widths_N, val_index.heights_N, config.eval.resize, config.eval.crop)
        self.loader = self._loader(
            train_index,
            derived.device_batch_size,
            data.interpolation,
            augment=config.augment,
            skip_by=self.plan if data.on_corrupt == "skip" else None,
        )
        self.eval_loader = self._loader(val_index, derived.eval_batch_size, config.eval.interpolation)
        self.state = RunState()
        self._told = 0  # of the skipped samples

    def fit(self, resume: Path | None = None) -> None:
        """Trains to the end of the run, from `resume` (a sealed checkpoint) or from the start."""
        if resume is not None:
            self.state = restore(self.engine, self.config, self.derived, resume)
            self.report({"kind": "resumed", "samples_seen": self.state.samples_seen, "checkpoint": str(resume)})
        batch_size, total_steps = self.derived.global_batch_size, self.derived.total_steps
        first_step = self.state.samples_seen // batch_size
        meter = Meter(self.derived, self.device)
        with closing(self.loader), closing(self.eval_loader), closing(self._batches(first_step)) as batches:
            for step in range(first_step, total_steps):
                rate = learning_rate(self.config.schedule, self.derived, self.state.samples_seen)
                self.engine.set_learning_rate(rate)
                for micro in range(self.derived.accumulation):
                    with meter.waiting():
                        batch = next(batches)
                    self._seed_dropout(step, micro)
                    logits_NK = self.engine.forward(batch.images_NCHW)
                    loss = self.criterion(logits_NK, batch.targets, batch.images_NCHW)
                    self.engine.backward(loss)
                    meter.add(loss)
                self.engine.update_ema(step + 1)
                self.state.samples_seen += batch_size
                last = step + 1 == total_steps
                if step == first_step:
                    self.report({"kind": "first_step"})
                if last or (step + 1) % self.config.train.log_every_steps == 0:
                    self._log(meter, step + 1, rate)
                    self._tell_skipped()
                evaluate_now = last or self._passed_epoch(self.config.eval.every_epochs)
                is_best = evaluate_now and self._evaluate()
                if last or is_best or self._passed_epoch(self.config.checkpoint.every_epochs):
                    self._checkpoint()
                if evaluate_now:
                    meter.restart()
            if first_step < total_steps:
                self.report({"kind": "trained", "img_per_s": meter.mean_img_per_s()})

    def _batches(self, first_step: int) -> Generator[Batch]:
        """This rank's micro-batches from `first_step` to the end of the run."""
        return self.loader.run(self._planned(first_step))

    def _planned(self, first_step: int) -> Iterator[PlannedBatch]:
        d = self.derived
        for step in range(first_step, d.total_steps):
            side = self.config.data.side_at(step * d.global_batch_size / d.train_samples)
            for micro in range(d.accumulation):
                positions_B = micro_batch(step, micro, self.rank, d.workers, d.device_batch_size, d.accumulation)
                yield self.plan.batch(positions_B, side)

    def _loader(
        self,
        index: DatasetIndex,
        batch_size: int,
        interpolation: Interpolation,
        augment: Augment | None = None,
        skip_by: TrainPlan | None = None,
    ) -> Loader:
        data = self.config.data
        return Loader(
            index,
            device=self.derived.device,
            device_id=self.device.index if self.derived.device == "cuda" else None,
            threads=self.derived.cpus_per_worker if data.threads == "auto" else data.threads,
            readers=data.readers,
            max_batch_size=batch_size,
            interpolation=interpolation,
            mean=data.mean,
            std=data.std,
            augment=augment,
            skip_by=skip_by,
            channels=self.config.model.in_chans,
            num_classes=self.derived.num_classes,
        )

    def _seed_dropout(self, step: int, micro: int) -> None:
        """Makes dropout a function of the seed and the place in the run alone, so that resumed runs repeat it."""
        if self._drops:
            numbers = np.random.SeedSequence([self.config.run.seed, step, micro, self.rank])
            torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0]))

    def _warn(self, message: str) -> None:
        self.report({"kind": "warning", "message": message})

    def _passed_epoch(self, every: int) -> bool:
        """Whether the last step completed an epoch whose number is a multiple of `every`."""
        n = self.derived.train_samples * every
        seen = self.state.samples_seen
        return seen // n > (seen - self.derived.global_batch_size) // n

    @property
    def _epoch(self) -> float:
        return self.state.samples_seen / self.derived.train_samples

    def _log(self, meter: Meter, step: int, rate: float) -> None:
        record = meter.read(step)
        if not math.isfinite(record["loss"]):
            raise UserError(
                f"the training loss is {record['loss']} at step {step} (epoch {self._epoch:.2f}): lower optim.lr "
                f"(now {self.config.optim.lr:g}), lengthen schedule.warmup_epochs or set optim.clip_grad_norm."
            )
        self.report(
            {"kind": "step", "step": step, "samples_seen": self.state.samples_seen, "epoch": self._epoch, "lr": rate}
            | record
        )

    def _tell_skipped(self) -> None:
        for sample in list(self.loader.skipped)[self._told :]:
            self.report({"kind": "skipped", "sample": sample, "message": self.loader.skipped[sample]})
            self._told += 1

    def _evaluate(self) -> bool:
        """Evaluates the weights and their average, reports, and says whether this is the run's best result so far."""
        self.engine.average_batch_norm()
        self.engine.train(False)
        results: dict[Weights, EvalResult] = {}
        results["raw"] = self._evaluate_one("raw", self.engine.forward, self.engine.forward_is_collective)
        if self.engine.ema is not None:
            results["ema"] = self._evaluate_one("ema", partial(self.engine.infer, self.engine.ema), False)
        self.engine.train(True)
        return self.state.record(results)

    def _evaluate_one(self, weights: Weights, forward: Forward, forward_is_collective: bool) -> EvalResult:
        started = time.perf_counter()
        result = evaluate(
            forward,
            self.eval_loader,
            self.eval_plan,
            self.derived.eval_batch_size,
            self.derived.num_classes,
            forward_is_collective,
        )
        self.report(
            {
                "kind": "eval",
                "weights": weights,
                "samples_seen": self.state.samples_seen,
                "epoch": self._epoch,
                "img_per_s": result.total / (time.perf_counter() - started),
                **asdict(result),
            }
        )
        return result

    def _checkpoint(self) -> None:
        self.engine.average_batch_norm()
        folder = save(self.engine, self.config, self.derived, self.state, self.classes, self.run_dir)
        self.report({"kind": "checkpoint", "samples_seen": self.state.samples_seen, "checkpoint": str(folder)})
