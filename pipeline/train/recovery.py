"""Handles a NaN or infinite loss (`train.on_nan`), and fp16 gradients that overflow at every loss scale."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import RunConfig
from pipeline.derived import Derived
from pipeline.errors import UserError
from pipeline.train.diagnosis import diagnose
from pipeline.train.dropout import seed_dropout
from pipeline.train.engine import Engine
from pipeline.train.events import Diagnosed, Report, Warned
from pipeline.train.inputs import Inputs
from pipeline.train.meter import IntervalMetrics
from pipeline.train.state import RunState, create_engine, latest_checkpoint

_MAX_LOSSES = 50  # of micro-batches, in the diagnosis file
_MIN_LOSS_SCALE = 1.0  # a smaller loss scale does not prevent fp16 overflow; DeepSpeed's own scaler stops there too


@dataclass(frozen=True)
class NonFiniteStep:
    """A step (counted from 0) with a NaN or infinite loss on some ranks, and this rank's last micro-batch."""

    step: int
    lr: float
    images_NCHW: torch.Tensor
    ranks: list[int]


class Recovery:
    """Stops the run, skips the step or rewinds to the latest checkpoint on a non-finite loss, by `train.on_nan`.

    `wait_for_checkpoint` waits until the checkpoint in progress is written.
    """

    def __init__(
        self,
        config: RunConfig,
        derived: Derived,
        state: RunState,
        inputs: Inputs,
        *,
        run_dir: Path,
        device: torch.device,
        report: Report,
        wait_for_checkpoint: Callable[[], object],
    ) -> None:
        self._config, self._derived, self._state, self._inputs = config, derived, state, inputs
        self._run_dir, self._device, self._report = run_dir, device, report
        self._wait_for_checkpoint = wait_for_checkpoint
        self._losses: deque[torch.Tensor] = deque(maxlen=max(_MAX_LOSSES, derived.gradient_accumulation_steps))

    def add_loss(self, loss: torch.Tensor) -> None:
        """Stores a micro-batch's loss, on the device, for the diagnosis."""
        self._losses.append(loss.detach())

    def recover(self, engine: Engine, bad: NonFiniteStep) -> Engine:
        """Handles a step with a non-finite loss before its optimizer step; returns the engine to use (a collective).

        `samples_seen` advances in any case: a skipped step's images are not seen again, nor after a rewind those since
        the checkpoint, as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).

        Raises:
            UserError: `train.on_nan` is `stop`, `train.nan_limit` is exceeded, or the run cannot recover.
        """
        train, state = self._config.train, self._state
        file, non_finite_weights = self._diagnose(engine, bad)
        ranks = ", ".join(map(str, bad.ranks))
        what = f"the training loss is NaN or infinite at step {bad.step + 1} (epoch {self._epoch:.2f}) on rank {ranks}"
        state.non_finite_steps += 1
        if train.on_nan == "skip" and non_finite_weights:
            what += f", and skipping steps cannot help: {non_finite_weights[0]} itself is NaN or infinite"
        elif train.on_nan != "stop" and state.non_finite_steps <= train.nan_limit:
            count = f"{state.non_finite_steps} of at most {train.nan_limit}, see {file}"
            if train.on_nan == "skip":
                engine.restore_batch_norm()
                engine.step(skip=True)
                self._warn(f"{what}: the step is skipped ({count})")
                return engine
            self._wait_for_checkpoint()
            latest = latest_checkpoint(self._config, self._run_dir, self._warn)
            if latest is not None:
                engine.close()
                engine = create_engine(self._config, self._derived, self._device, self._warn, checkpoint=latest)
                self._warn(f"{what}: rewound to checkpoint {latest.name} ({count})")
                return engine
        before = f", {state.non_finite_steps - 1} times before in this run" if state.non_finite_steps > 1 else ""
        raise UserError(
            f"{what}{before}: lower optim.lr (now {self._config.optim.lr:g}), lengthen schedule.warmup_epochs or set "
            f"optim.clip_grad_norm; train.on_nan=skip or rewind continues the run. The checkpoints are valid. The "
            f"layers' outputs and the images of the step are in {file}."
        )

    def check_loss_scale(self, step: int, metrics: IntervalMetrics, scale: float | None) -> None:
        """Checks the loss scale of fp16 after `step` (counted from 1).

        Raises:
            UserError: gradients overflow at every loss scale, so they are not finite.
        """
        if scale is None or scale >= _MIN_LOSS_SCALE or not metrics.all_skipped or metrics.loss is None:
            return
        raise UserError(
            f"fp16 gradients overflowed in every step up to step {step}, although the loss scale has fallen to "
            f"{scale:g}: the gradients are not finite. Lower optim.lr (now {self._config.optim.lr:g}), or set "
            f"train.precision=bf16. The checkpoints are valid."
        )

    @property
    def _epoch(self) -> float:
        return self._state.samples_seen / self._derived.train_samples

    def _warn(self, message: str) -> None:
        self._report(Warned(message))

    def _diagnose(self, engine: Engine, bad: NonFiniteStep) -> tuple[Path, list[str]]:
        """Writes the diagnosis file; returns it and the names of non-finite weights (a collective)."""
        file = self._run_dir / "diagnosis" / f"step-{bad.step + 1:07d}.json"
        seed_dropout(self._config, bad.step, self._derived.gradient_accumulation_steps - 1)
        non_finite_weights = engine.non_finite_weights()
        diagnose(
            file,
            {
                "step": bad.step + 1,
                "epoch": self._epoch,
                "learning_rate": bad.lr,
                "precision": self._derived.precision,
                "on_ranks": bad.ranks,
                "non_finite_weights": non_finite_weights,
            },
            self._inputs.images(bad.step),
            list(self._losses),
            engine.module,
            lambda: engine.infer(engine.module, bad.images_NCHW),
        )
        self._report(Diagnosed(file))
        return file, non_finite_weights
