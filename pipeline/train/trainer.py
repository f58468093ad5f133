"""The training loop of one rank."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.config import RunConfig
from pipeline.data.dali import Batch
from pipeline.derived import Derived
from pipeline.errors import UserError
from pipeline.evaluation.counts import EvalResult
from pipeline.evaluation.tables import CONFUSION, write_confusion
from pipeline.model.pretrained import NO_PRETRAINED, Pretrained
from pipeline.model.weights import load_teacher
from pipeline.train.batch_size_finder import too_large
from pipeline.train.checkpoint import checkpoint_root, samples_of
from pipeline.train.dropout import seed_dropout
from pipeline.train.evaluate import Forward, evaluate
from pipeline.train.events import (
    Evaluated,
    FirstStep,
    Profiled,
    Report,
    Resumed,
    Saved,
    Skipped,
    Step,
    Stopped,
    Trained,
    Warned,
    Weights,
)
from pipeline.train.finite import FiniteLoss
from pipeline.train.inputs import Inputs
from pipeline.train.loss import Criterion
from pipeline.train.meter import Meter
from pipeline.train.mfu import peak_flops, utilization
from pipeline.train.profile import Profile
from pipeline.train.recovery import BadStep, Recovery
from pipeline.train.schedule import learning_rate
from pipeline.train.state import RunState, new_engine, resumed, save
from pipeline.train.storage import storage_of
from pipeline.train.writer import Writer


class Trainer:
    """Trains one model on one rank of a process group that exists already; see `pipeline.train.rank`.

    `report` receives events; it must return at once. Those of rank 0 count; but every rank tells of the corrupt
    training images that it met and replaced (`Skipped`). `sources` are the weights to start from and the teacher,
    where the config asks for them; `resume` is a committed checkpoint to go on from instead. When `should_stop` is true on
    any rank, which all look at when logging, all end after a checkpoint; when `should_save` is, they go on after one.
    `alive` is called with every batch.
    """

    def __init__(
        self,
        config: RunConfig,
        derived: Derived,
        inputs: Inputs,
        *,
        run_dir: Path,
        device: torch.device,
        report: Report,
        sources: Pretrained = NO_PRETRAINED,
        resume: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        should_save: Callable[[], bool] = lambda: False,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.derived, self.inputs = config, derived, inputs
        self.run_dir, self.device, self.report = run_dir, device, report
        self.should_stop, self.should_save, self.alive = should_stop, should_save, alive
        self.rank = dist.get_rank()
        self.state = RunState() if resume is None else resumed(config, derived, inputs.train_index, resume)
        self.engine = new_engine(config, derived, device, self._warn, weights=sources.weights, checkpoint=resume)
        if resume is not None:
            report(Resumed(self.state.samples_seen, resume))
        self.criterion = self._criterion(sources)
        self._finite, self._meter = FiniteLoss(device), Meter(derived, device, self._warn)
        self._profile = Profile(config.train.profile_steps, run_dir) if self.rank == 0 else None
        self._writer = None
        if self.rank == 0:
            self._writer = Writer(checkpoint_root(run_dir), self._saved, self._warn, storage_of(config))
        self._recovery = Recovery(
            config,
            derived,
            self.state,
            inputs,
            run_dir=run_dir,
            device=device,
            report=report,
            written=self._writer.wait if self._writer is not None else lambda: None,
        )
        self._saved_at = time.monotonic()

    def fit(self) -> None:
        """Trains to the end of the run, and closes the inputs.

        Raises:
            UserError: what the user can fix: corrupt images, a loss that is NaN or infinite, too little GPU memory, a last
                checkpoint that cannot be written.
        """
        try:
            with closing(self.inputs), self._writer or nullcontext(), self._profile or nullcontext():
                self._fit()
        except torch.OutOfMemoryError as error:
            raise UserError(too_large(self.derived, self.config)) from error

    def _fit(self) -> None:
        """For each step: train it, then what is due: log, evaluate, checkpoint."""
        batch_size, total_steps = self.derived.global_batch_size, self.derived.total_steps
        first_step = self.state.samples_seen // batch_size
        self._meter.restart()
        with closing(self.inputs.batches(first_step)) as batches:
            for step in range(first_step, total_steps):
                last = step + 1 == total_steps
                log_now = last or (step + 1) % self.config.train.log_every_steps == 0
                rate = learning_rate(self.config.schedule, self.derived, self.state.samples_seen)
                self._train_step(step, rate, batches, measure=log_now)
                self.state.samples_seen += batch_size
                self._tell_done(step, first=step == first_step)
                stop, save = self._log(step + 1, rate) if log_now else (False, False)
                evaluate_now = last or self._passed_epoch(self.config.eval.every_epochs)
                is_best = evaluate_now and self._evaluate()
                if last or is_best or stop or save or self._checkpoint_due():
                    self._checkpoint()
                if evaluate_now:
                    self._meter.restart()
                if stop and not last:
                    self.report(Stopped(self.state.samples_seen))
                    return
        if first_step < total_steps:
            self.report(Trained(self._meter.mean_img_per_s()))

    def _train_step(self, step: int, rate: float, batches: Iterator[Batch], measure: bool) -> None:
        """Trains one global batch; `measure` asks for the gradient's norm."""
        self.engine.set_learning_rate(rate)
        if self.config.train.on_nan == "skip":
            self.engine.keep_statistics()
        self._meter.begin()
        for micro in range(self.derived.gradient_accumulation_steps):
            self.alive()
            with self._meter.waiting():
                batch = next(batches)
            seed_dropout(self.config, step, micro)
            logits_NK = self.engine.forward(batch.images_NCHW)
            loss = self.criterion(logits_NK, batch.targets, batch.images_NCHW)
            self._finite.add(loss)
            if micro + 1 == self.derived.gradient_accumulation_steps:
                self._finite.ask()
                self._meter.forwarded()
            self.engine.backward(loss)
            self._meter.add(loss)
            self._recovery.note(loss)
        if wrong := self._finite.ranks():
            self.engine = self._recovery.recover(self.engine, BadStep(step, rate, batch.images_NCHW, wrong))
            self._meter.skipped()
            return
        applied = self.engine.step(measure=measure)
        self._meter.stepped(applied)
        if applied:
            self.engine.update_ema(step + 1)

    def _criterion(self, sources: Pretrained) -> Criterion:
        """The loss, with the teacher where there is one."""
        teacher = None
        if sources.teacher is not None:
            classes, channels = self.inputs.train_index.classes, self.config.model.in_chans
            taught = load_teacher(sources.teacher, classes, channels).to(self.device)

            def teacher(images_NCHW: torch.Tensor) -> torch.Tensor:
                return self.engine.infer(taught, images_NCHW)

        return Criterion(self.config.loss, self.derived.num_classes, teacher)

    def _warn(self, message: str) -> None:
        self.report(Warned(message))

    def _tell_done(self, step: int, first: bool) -> None:
        if self._profile is not None and self._profile.step(step + 1):
            self.report(Profiled(self._profile.file))
        if first:
            self.report(FirstStep(self.state.samples_seen))

    def _passed(self, samples: int) -> bool:
        """Whether the last step passed a multiple of so many samples."""
        seen = self.state.samples_seen
        return seen // samples > (seen - self.derived.global_batch_size) // samples

    def _passed_epoch(self, every: int) -> bool:
        """Whether the last step completed an epoch whose number is a multiple of `every`."""
        return self._passed(self.derived.train_samples * every)

    def _checkpoint_due(self) -> bool:
        policy = self.config.checkpoint
        by_samples = policy.every_samples is not None and self._passed(policy.every_samples)
        return by_samples or self._passed_epoch(policy.every_epochs)

    @property
    def _epoch(self) -> float:
        return self.state.samples_seen / self.derived.train_samples

    def _log(self, step: int, rate: float) -> tuple[bool, bool]:
        """Reports, and says whether any rank wants to stop, and whether the minutes between checkpoints are over."""
        minutes = self.config.checkpoint.every_minutes
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        wishes = (self.should_stop(), self.should_save() or (late and self.rank == 0))
        reading, (stop, save) = self._meter.read(step, wishes)
        scale = None if self.engine.loss_scaler is None else self.engine.loss_scaler.get_scale()
        self._recovery.check_scale(step, reading, scale)
        memory_gb = mfu = None
        if self.device.type == "cuda":
            memory_gb = torch.cuda.max_memory_allocated(self.device) / 1e9
            peak = peak_flops(torch.cuda.get_device_name(self.device), self.derived.precision)
            if peak is not None:
                side, classes = self.config.data.image_size_at(self._epoch), self.derived.num_classes
                mfu = utilization(reading.img_per_s_worker, self.config.model, classes, side, peak)
        self.report(
            Step(
                step=step,
                samples_seen=self.state.samples_seen,
                epoch=self._epoch,
                lr=rate,
                loss=reading.loss,
                skipped_steps=reading.skipped_steps,
                img_per_s=reading.img_per_s,
                img_per_s_worker=reading.img_per_s_worker,
                step_s=reading.step_s,
                data_wait=reading.data_wait,
                eta_s=reading.eta_s,
                grad_norm=self.engine.grad_norm,
                loss_scale=scale,
                gpu_memory_gb=memory_gb,
                mfu=mfu,
            )
        )
        for sample, problem in self.inputs.newly_skipped():
            self.report(Skipped(sample, problem))
        return stop, save

    def _evaluate(self) -> bool:
        """Evaluates the weights and their average, reports, and says whether this is the run's best result so far."""
        self.engine.average_batch_norm()
        self.engine.train(False)
        found: dict[Weights, tuple[EvalResult, NDArray[np.int64] | None]] = {}
        found["raw"] = self._evaluate_one("raw", self.engine.forward, self.engine.forward_is_collective)
        if self.engine.ema is not None:
            found["ema"] = self._evaluate_one("ema", partial(self.engine.infer, self.engine.ema), False)
        self.engine.train(True)
        is_best = self.state.record({of: result for of, (result, _) in found.items()})
        matrix_KK = found[self.state.best_of][1]
        if is_best and self.rank == 0 and matrix_KK is not None:
            write_confusion(self.run_dir / CONFUSION, self.inputs.train_index.classes, matrix_KK)
        return is_best

    def _evaluate_one(
        self, weights: Weights, forward: Forward, forward_is_collective: bool
    ) -> tuple[EvalResult, NDArray[np.int64] | None]:
        started = time.perf_counter()
        result, matrix_KK = evaluate(
            lambda images_NCHW: (self.alive(), forward(images_NCHW))[1],
            self.inputs.eval_loader,
            self.inputs.eval_plan,
            self.derived.eval_batch_size,
            self.derived.num_classes,
            forward_is_collective,
        )
        self.report(
            Evaluated(
                weights=weights,
                samples_seen=self.state.samples_seen,
                epoch=self._epoch,
                img_per_s=result.total / (time.perf_counter() - started),
                result=result,
            )
        )
        return result, matrix_KK

    def _checkpoint(self) -> None:
        started = time.perf_counter()
        self.engine.average_batch_norm()
        save(self.engine, self.config, self.derived, self.state, self.inputs.train_index, self._writer)
        self._saved_at = time.monotonic()
        self._stall_s = time.perf_counter() - started

    def _saved(self, folder: Path, seconds: float) -> None:
        """Tells of a committed checkpoint (in the writer's thread)."""
        self.report(Saved(samples_of(folder), folder, self._stall_s, seconds))
