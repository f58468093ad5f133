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
from pipeline.train.batch_size_finder import out_of_memory_message
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
from pipeline.train.inputs import Inputs
from pipeline.train.loss import Criterion
from pipeline.train.meter import Meter
from pipeline.train.mfu import model_flops_utilization, peak_flops
from pipeline.train.non_finite import NonFiniteLossDetector
from pipeline.train.profile import StepProfiler
from pipeline.train.recovery import NonFiniteStep, Recovery
from pipeline.train.schedule import learning_rate
from pipeline.train.state import RunState, create_engine, restore_state, save_checkpoint
from pipeline.train.storage import checkpoint_storage
from pipeline.train.writer import CheckpointWriter


class Trainer:
    """Trains a model on one rank of an existing process group; see `pipeline.train.rank`.

    Args:
        config: The run's config.
        derived: The values derived from it.
        inputs: This rank's data; `fit` closes it.
        run_dir: The run's folder.
        device: This rank's device.
        report: Receives events, and must return at once. Use rank 0's events, and `Skipped` events of every rank.
        pretrained: The paths of `model.weights` and `loss.teacher`.
        resume: A committed checkpoint to resume from, instead of the pretrained weights.
        should_stop: Checked at log lines; if true on any rank, all ranks stop after a checkpoint.
        should_save: Checked at log lines; if true on any rank, the run writes a checkpoint and continues.
        heartbeat: Called with every batch.
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
        pretrained: Pretrained = NO_PRETRAINED,
        resume: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        should_save: Callable[[], bool] = lambda: False,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.derived, self.inputs = config, derived, inputs
        self.run_dir, self.device, self.report = run_dir, device, report
        self.should_stop, self.should_save, self.heartbeat = should_stop, should_save, heartbeat
        self.rank = dist.get_rank()
        self.state = RunState() if resume is None else restore_state(config, derived, inputs.train_index, resume)
        self.engine = create_engine(config, derived, device, self._warn, weights=pretrained.weights, checkpoint=resume)
        if resume is not None:
            report(Resumed(self.state.samples_seen, resume))
        self.criterion = self._create_criterion(pretrained)
        self._detector, self._meter = NonFiniteLossDetector(device), Meter(derived, device, self._warn)
        self._profile = StepProfiler(config.train.profile_steps, run_dir) if self.rank == 0 else None
        self._writer = None
        if self.rank == 0:
            self._writer = CheckpointWriter(
                checkpoint_root(run_dir), self._on_saved, self._warn, checkpoint_storage(config)
            )
        self._recovery = Recovery(
            config,
            derived,
            self.state,
            inputs,
            run_dir=run_dir,
            device=device,
            report=report,
            wait_for_checkpoint=self._writer.wait if self._writer is not None else lambda: None,
        )
        self._saved_at = time.monotonic()

    def fit(self) -> None:
        """Trains to the end of the run, and closes the inputs.

        Raises:
            UserError: an error that the user can fix: a corrupt image, a NaN or infinite loss, GPU out of memory, a
                last checkpoint that cannot be written.
        """
        try:
            with closing(self.inputs), self._writer or nullcontext(), self._profile or nullcontext():
                self._fit()
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory_message(self.derived, self.config)) from error

    def _fit(self) -> None:
        """Runs the training steps; logs, evaluates and writes checkpoints where due."""
        batch_size, total_steps = self.derived.global_batch_size, self.derived.total_steps
        first_step = self.state.samples_seen // batch_size
        self._meter.reset()
        with closing(self.inputs.batches(first_step)) as batches:
            for step in range(first_step, total_steps):
                last = step + 1 == total_steps
                log_now = last or (step + 1) % self.config.train.log_every_steps == 0
                lr = learning_rate(self.config.schedule, self.derived, self.state.samples_seen)
                self._train_step(step, lr, batches, measure_norm=log_now)
                self.state.samples_seen += batch_size
                self._report_step(step, first=step == first_step)
                stop, save = self._log(step + 1, lr) if log_now else (False, False)
                evaluate_now = last or self._completed_epochs(self.config.eval.every_epochs)
                is_best = evaluate_now and self._evaluate()
                if last or is_best or stop or save or self._checkpoint_due():
                    self._checkpoint()
                if evaluate_now:
                    self._meter.reset()
                if stop and not last:
                    self.report(Stopped(self.state.samples_seen))
                    return
        if first_step < total_steps:
            self.report(Trained(self._meter.mean_img_per_s()))

    def _train_step(self, step: int, lr: float, batches: Iterator[Batch], measure_norm: bool) -> None:
        """Trains on one global batch, with gradient accumulation; `measure_norm` measures the gradient norm."""
        self.engine.set_learning_rate(lr)
        if self.config.train.on_nan == "skip":
            self.engine.save_batch_norm()
        self._meter.begin_step()
        for micro in range(self.derived.gradient_accumulation_steps):
            self.heartbeat()
            with self._meter.data_wait():
                batch = next(batches)
            seed_dropout(self.config, step, micro)
            logits_NK = self.engine.forward(batch.images_NCHW)
            loss = self.criterion(logits_NK, batch.targets, batch.images_NCHW)
            self._detector.add(loss)
            if micro + 1 == self.derived.gradient_accumulation_steps:
                self._detector.start_exchange()
                self._meter.end_forward()
            self.engine.backward(loss)
            self._meter.add_loss(loss)
            self._recovery.add_loss(loss)
        if bad_ranks := self._detector.bad_ranks():
            bad_step = NonFiniteStep(step, lr, batch.images_NCHW, bad_ranks)
            self.engine = self._recovery.recover(self.engine, bad_step)
            self._meter.skip_step()
            return
        applied = self.engine.step(measure_norm=measure_norm)
        self._meter.end_step(applied)
        if applied:
            self.engine.update_ema(step + 1)

    def _create_criterion(self, pretrained: Pretrained) -> Criterion:
        """Creates the loss, with the teacher for knowledge distillation if there is one."""
        teacher = None
        if pretrained.teacher is not None:
            classes, channels = self.inputs.train_index.classes, self.config.model.in_chans
            teacher_model = load_teacher(pretrained.teacher, classes, channels).to(self.device)

            def teacher(images_NCHW: torch.Tensor) -> torch.Tensor:
                return self.engine.infer(teacher_model, images_NCHW)

        return Criterion(self.config.loss, self.derived.num_classes, teacher)

    def _warn(self, message: str) -> None:
        self.report(Warned(message))

    def _report_step(self, step: int, first: bool) -> None:
        if self._profile is not None and self._profile.step(step + 1):
            self.report(Profiled(self._profile.file))
        if first:
            self.report(FirstStep(self.state.samples_seen))

    def _passed_multiple(self, samples: int) -> bool:
        """Whether the last step passed a multiple of `samples`."""
        seen = self.state.samples_seen
        return seen // samples > (seen - self.derived.global_batch_size) // samples

    def _completed_epochs(self, every: int) -> bool:
        """Whether the last step completed an epoch whose number is a multiple of `every`."""
        return self._passed_multiple(self.derived.train_samples * every)

    def _checkpoint_due(self) -> bool:
        policy = self.config.checkpoint
        by_samples = policy.every_samples is not None and self._passed_multiple(policy.every_samples)
        return by_samples or self._completed_epochs(policy.every_epochs)

    @property
    def _epoch(self) -> float:
        return self.state.samples_seen / self.derived.train_samples

    def _log(self, step: int, lr: float) -> tuple[bool, bool]:
        """Reports a `Step`; returns whether to stop and whether to write a checkpoint, the same on all ranks."""
        minutes = self.config.checkpoint.every_minutes
        overdue = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        flags = (self.should_stop(), self.should_save() or (overdue and self.rank == 0))
        metrics, (stop, save) = self._meter.read(step, flags)
        scale = None if self.engine.loss_scaler is None else self.engine.loss_scaler.get_scale()
        self._recovery.check_loss_scale(step, metrics, scale)
        memory_gb = mfu = None
        if self.device.type == "cuda":
            memory_gb = torch.cuda.max_memory_allocated(self.device) / 1e9
            peak = peak_flops(torch.cuda.get_device_name(self.device), self.derived.precision)
            if peak is not None:
                side, classes = self.config.data.image_size_at(self._epoch), self.derived.num_classes
                mfu = model_flops_utilization(metrics.img_per_s_worker, self.config.model, classes, side, peak)
        self.report(
            Step(
                step=step,
                samples_seen=self.state.samples_seen,
                epoch=self._epoch,
                lr=lr,
                loss=metrics.loss,
                skipped_steps=metrics.skipped_steps,
                img_per_s=metrics.img_per_s,
                img_per_s_worker=metrics.img_per_s_worker,
                step_s=metrics.step_s,
                data_wait=metrics.data_wait,
                eta_s=metrics.eta_s,
                grad_norm=self.engine.grad_norm,
                loss_scale=scale,
                gpu_memory_gb=memory_gb,
                mfu=mfu,
                slow_ranks=metrics.stragglers.slow_ranks,
                slowest_rank=metrics.stragglers.slowest_rank,
                slowest_rank_ratio=metrics.stragglers.slowest_rank_ratio,
            )
        )
        for sample, problem in self.inputs.newly_skipped():
            self.report(Skipped(sample, problem))
        return stop, save

    def _evaluate(self) -> bool:
        """Evaluates the weights and the EMA, and reports; returns whether this is the run's best result so far."""
        self.engine.average_batch_norm()
        self.engine.train(False)
        evaluations: dict[Weights, tuple[EvalResult, NDArray[np.int64] | None]] = {}
        evaluations["raw"] = self._evaluate_one("raw", self.engine.forward, self.engine.forward_is_collective)
        if self.engine.ema is not None:
            evaluations["ema"] = self._evaluate_one("ema", partial(self.engine.infer, self.engine.ema), False)
        self.engine.train(True)
        is_best = self.state.record({weights: result for weights, (result, _) in evaluations.items()})
        matrix_KK = evaluations[self.state.best_of][1]
        if is_best and self.rank == 0 and matrix_KK is not None:
            write_confusion(self.run_dir / CONFUSION, self.inputs.train_index.classes, matrix_KK)
        return is_best

    def _evaluate_one(
        self, weights: Weights, forward: Forward, forward_is_collective: bool
    ) -> tuple[EvalResult, NDArray[np.int64] | None]:
        started = time.perf_counter()
        result, matrix_KK = evaluate(
            lambda images_NCHW: (self.heartbeat(), forward(images_NCHW))[1],
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
        save_checkpoint(self.engine, self.config, self.derived, self.state, self.inputs.train_index, self._writer)
        self._saved_at = time.monotonic()
        self._stall_s = time.perf_counter() - started

    def _on_saved(self, folder: Path, seconds: float) -> None:
        """Reports a committed checkpoint (in the writer's thread)."""
        self.report(Saved(samples_of(folder), folder, self._stall_s, seconds))
