"""The training loop of one rank."""

import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.config import Augment, Interpolation, RunConfig
from pipeline.data.dali import Batch, Loader
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, PlannedBatch, TrainPlan, micro_batch
from pipeline.derived import Derived
from pipeline.errors import UserError
from pipeline.evaluation.tables import CONFUSION, write_confusion
from pipeline.model.densenet import create
from pipeline.model.nets import draws
from pipeline.model.sources import NO_SOURCES, Sources
from pipeline.model.weights import load_teacher, load_weights
from pipeline.train.checkpoint import checkpoint_root, samples_of
from pipeline.train.diagnosis import diagnose
from pipeline.train.engine import Engine
from pipeline.train.evaluate import EvalResult, Forward, evaluate
from pipeline.train.finite import FiniteLoss
from pipeline.train.fitting import fitting, too_large
from pipeline.train.loss import Criterion
from pipeline.train.meter import Meter
from pipeline.train.mfu import peak_flops, utilization
from pipeline.train.profile import Profile
from pipeline.train.schedule import learning_rate
from pipeline.train.state import RunState, Weights, load_into, newest_checkpoint, resumed, save
from pipeline.train.storage import storage_of
from pipeline.train.writer import Writer

Report = Callable[[dict[str, Any]], None]
_LOSSES_KEPT = 50  # micro-batches, for the diagnosis of one whose loss is no number
_LEAST_SCALE = 1.0  # a loss scale below it does not make gradients fit into fp16; DeepSpeed's own ends a run there


class Trainer:
    """Trains one model on one rank of a process group that exists already.

    `report` receives events (dicts with a `kind`); it must return at once. Those of rank 0 count; but every rank tells
    of the damaged training pictures that it met and replaced (`skipped`). `sources` are the weights to start from and
    the teacher, where the config asks for them; `resume` is a sealed checkpoint to go on from instead. When
    `should_stop` is true on any rank, which all look at when logging, all end after a checkpoint; when `should_save`
    is, they go on after one. `alive` is called with every batch.
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
        resume: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        should_save: Callable[[], bool] = lambda: False,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.run_dir, self.device, self.report = config, run_dir, device, report
        self.train_index, self.alive = train_index, alive
        self.should_stop, self.should_save = should_stop, should_save
        self.rank = dist.get_rank()
        if config.train.on_out_of_memory == "halve":
            derived = fitting(config, derived, device, self._warn)
        self.derived = derived
        self.state = RunState() if resume is None else resumed(config, derived, train_index, resume)
        self.engine = self._new_engine(sources.weights, resume)
        if resume is not None:
            self.report({"kind": "resumed", "samples_seen": self.state.samples_seen, "checkpoint": str(resume)})
        teacher = None
        if sources.teacher is not None:
            taught = load_teacher(sources.teacher, train_index.classes, config.model.in_chans).to(device)

            def teacher(images_NCHW: torch.Tensor) -> torch.Tensor:
                return self.engine.infer(taught, images_NCHW)

        self.criterion = Criterion(config.loss, derived.num_classes, teacher)
        self._losses: deque[torch.Tensor] = deque(maxlen=max(_LOSSES_KEPT, derived.accumulation))
        self._drops = draws(config.model)
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
        root = checkpoint_root(run_dir)
        self._writer = Writer(root, self._saved, self._warn, storage_of(config)) if self.rank == 0 else None
        self._saved_at = time.monotonic()
        self._told = 0  # of the skipped samples
        self._hosts: list[str] = [""] * derived.workers
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._slow_before: set[int] = set()
        self._slow_told: set[int] = set()

    def fit(self) -> None:
        """Trains to the end of the run.

        Raises:
            UserError: what the user can mend: damaged pictures, a loss that is no number, too little GPU memory, a last
                checkpoint that cannot be written.
        """
        try:
            self._fit()
        except torch.OutOfMemoryError as error:
            raise UserError(too_large(self.derived, self.config)) from error

    def _fit(self) -> None:
        batch_size, total_steps = self.derived.global_batch_size, self.derived.total_steps
        first_step = self.state.samples_seen // batch_size
        meter, finite = Meter(self.derived, self.device), FiniteLoss(self.device)
        profile = Profile(self.config.train.profile_steps, self.run_dir) if self.rank == 0 else None
        with (
            closing(self.loader),
            closing(self.eval_loader),
            self._writer or nullcontext(),
            profile or nullcontext(),
            closing(self._batches(first_step)) as batches,
        ):
            for step in range(first_step, total_steps):
                rate = learning_rate(self.config.schedule, self.derived, self.state.samples_seen)
                last = step + 1 == total_steps
                log_now = last or (step + 1) % self.config.train.log_every_steps == 0
                self.engine.set_learning_rate(rate)
                if self.config.train.on_nan == "skip":
                    self.engine.keep_statistics()
                meter.begin()
                for micro in range(self.derived.accumulation):
                    self.alive()
                    with meter.waiting():
                        batch = next(batches)
                    self._seed_dropout(step, micro)
                    logits_NK = self.engine.forward(batch.images_NCHW)
                    loss = self.criterion(logits_NK, batch.targets, batch.images_NCHW)
                    finite.add(loss)
                    if micro + 1 == self.derived.accumulation:
                        finite.ask()
                        meter.forwarded()
                    self.engine.backward(loss)
                    meter.add(loss)
                    self._losses.append(loss.detach())
                if wrong := finite.ranks():
                    self._no_number(step, batch, rate, wrong)
                    meter.left_out()
                else:
                    applied = self.engine.step(measure=log_now)
                    meter.stepped(applied)
                    if applied:
                        self.engine.update_ema(step + 1)
                self.state.samples_seen += batch_size
                if profile is not None and profile.step(step + 1):
                    self.report({"kind": "profile", "file": str(profile.file)})
                if step == first_step:
                    self.report({"kind": "first_step", "samples_seen": self.state.samples_seen})
                stop = save = False
                if log_now:
                    stop, save = self._log(meter, step + 1, rate)
                    self._tell_skipped()
                evaluate_now = last or self._passed_epoch(self.config.eval.every_epochs)
                is_best = evaluate_now and self._evaluate()
                if last or is_best or stop or save or self._checkpoint_due():
                    self._checkpoint()
                if evaluate_now:
                    meter.restart()
                if stop and not last:
                    self.report({"kind": "stopped", "samples_seen": self.state.samples_seen})
                    return
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

    def _log(self, meter: Meter, step: int, rate: float) -> tuple[bool, bool]:
        """Reports, and says whether any rank wants to stop, and whether the minutes between checkpoints are over."""
        minutes = self.config.checkpoint.every_minutes
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        wishes = (self.should_stop(), self.should_save() or (late and self.rank == 0))
        record, (stop, save) = meter.read(step, wishes)
        self._tell_slow(record.pop("slow_ranks"))
        norm = self.engine.grad_norm
        if norm is not None:
            record["grad_norm"] = norm
        all_skipped = record.pop("all_skipped")
        if self.engine.loss_scaler is not None:
            record["loss_scale"] = scale = self.engine.loss_scaler.get_scale()
            if all_skipped and scale < _LEAST_SCALE and record["loss"] is not None:
                raise UserError(
                    f"fp16 gradients overflowed in every step up to step {step}, although the loss scale has fallen to "
                    f"{scale:g}: the gradients are not finite. Lower optim.lr (now {self.config.optim.lr:g}), or set "
                    f"train.precision=bf16. The checkpoints are sound."
                )
        if self.device.type == "cuda":
            record["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            peak = peak_flops(torch.cuda.get_device_name(self.device), self.derived.precision)
            if peak is not None:
                side, classes = self.config.data.side_at(self._epoch), self.derived.num_classes
                record["mfu"] = utilization(record["img_per_s_worker"], self.config.model, classes, side, peak)
        self.report(
            {"kind": "step", "step": step, "samples_seen": self.state.samples_seen, "epoch": self._epoch, "lr": rate}
            | record
        )
        return stop, save

    def _no_number(self, step: int, batch: Batch, rate: float, ranks: list[int]) -> None:
        """Mends a step whose loss is no number on some ranks, by `train.on_nan`; the optimizer has not stepped.

        The clock goes on in any case: a step that is left out is left out for ever, and after a return to a checkpoint
        the pictures since then are not seen again, as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).
        """
        train = self.config.train
        file, spoiled = self._diagnosed(step, batch, rate, ranks)
        on = ", ".join(map(str, ranks))
        what = f"the training loss is no number at step {step + 1} (epoch {self._epoch:.2f}) on rank {on}"
        self.state.mended += 1
        if train.on_nan == "skip" and spoiled:
            what += f", and leaving out steps cannot help any more: {spoiled[0]} itself is not finite"
        elif train.on_nan != "stop" and self.state.mended <= train.nan_limit:
            count = f"{self.state.mended} of at most {train.nan_limit}, see {file}"
            if train.on_nan == "skip":
                self.engine.restore_statistics()
                self.engine.step(skip=True)
                self._warn(f"{what}: the step is left out ({count})")
                return
            if self._writer is not None:
                self._writer.wait()
            newest = newest_checkpoint(self.config, self.run_dir, self._warn)
            if newest is not None:
                self.engine.close()
                self.engine = self._new_engine(None, newest)
                self._warn(f"{what}: the weights are those of {newest.name} again ({count})")
                return
        again = f", {self.state.mended - 1} times before in this run" if self.state.mended > 1 else ""
        raise UserError(
            f"{what}{again}: lower optim.lr (now {self.config.optim.lr:g}), lengthen schedule.warmup_epochs or set "
            f"optim.clip_grad_norm; train.on_nan=skip or rewind goes on. The checkpoints are sound. What the layers "
            f"gave, and for which pictures, is in {file}."
        )

    def _diagnosed(self, step: int, batch: Batch, rate: float, ranks: list[int]) -> tuple[Path, list[str]]:
        """Writes what is known of such a step, and names the weights that are not finite (a collective)."""
        d, file = self.derived, self.run_dir / "diagnosis" / f"step-{step + 1:07d}.json"
        positions = [
            micro_batch(step, micro, self.rank, d.workers, d.device_batch_size, d.accumulation)
            for micro in range(d.accumulation)
        ]
        self._seed_dropout(step, d.accumulation - 1)
        spoiled = self.engine.spoiled()
        diagnose(
            file,
            {
                "step": step + 1,
                "epoch": self._epoch,
                "learning_rate": rate,
                "precision": d.precision,
                "on_ranks": ranks,
                "weights_that_are_no_numbers": spoiled,
            },
            [self.train_index.describe(sample) for sample in self.plan.locate(np.concatenate(positions))[1]],
            list(self._losses),
            self.engine.module,
            lambda: self.engine.infer(self.engine.module, batch.images_NCHW),
        )
        self.report({"kind": "diagnosis", "file": str(file)})
        return file, spoiled

    def _new_engine(self, weights: Path | None, checkpoint: Path | None) -> Engine:
        """An engine with the weights and all else of a checkpoint, or with weights from elsewhere, or new ones."""
        torch.manual_seed(self.config.run.seed)
        model = create(self.config.model, self.derived.num_classes)
        if checkpoint is not None:
            load_weights(model, checkpoint / "model.safetensors")
        elif weights is not None:
            load_weights(model, weights)
        engine = Engine(self.config, self.derived, model, self.device, self._warn)
        if checkpoint is not None:
            load_into(engine, checkpoint)
        return engine

    def _tell_slow(self, ranks: dict[int, float]) -> None:
        """Names a rank that holds up the others for the second time in a row, once."""
        for rank, ratio in ranks.items():
            if rank in self._slow_before and rank not in self._slow_told:
                self._slow_told.add(rank)
                self._warn(
                    f"rank {rank} on {self._hosts[rank]} is slow: it takes {ratio:.1f} times as long as the median "
                    f"rank to its loss, and the others wait for it"
                )
        self._slow_before = set(ranks)

    def _tell_skipped(self) -> None:
        for sample in list(self.loader.skipped)[self._told :]:
            self.report({"kind": "skipped", "sample": sample, "message": self.loader.skipped[sample]})
            self._told += 1

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
            write_confusion(self.run_dir / CONFUSION, self.train_index.classes, matrix_KK)
        return is_best

    def _evaluate_one(
        self, weights: Weights, forward: Forward, forward_is_collective: bool
    ) -> tuple[EvalResult, NDArray[np.int64] | None]:
        started = time.perf_counter()
        result, matrix_KK = evaluate(
            lambda images_NCHW: (self.alive(), forward(images_NCHW))[1],
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
        return result, matrix_KK

    def _checkpoint(self) -> None:
        started = time.perf_counter()
        self.engine.average_batch_norm()
        save(self.engine, self.config, self.derived, self.state, self.train_index, self._writer)
        self._saved_at = time.monotonic()
        self._stall_s = time.perf_counter() - started

    def _saved(self, folder: Path, seconds: float) -> None:
        """Tells of a sealed checkpoint (in the writer's thread)."""
        self.report(
            {
                "kind": "checkpoint",
                "samples_seen": samples_of(folder),
                "checkpoint": str(folder),
                "stall_s": self._stall_s,
                "write_s": seconds,
            }
        )
