"""What becomes of a run that meets a loss which is no number, or gradients that fp16 cannot hold."""

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
from pipeline.train.meter import Reading
from pipeline.train.state import RunState, new_engine, newest_checkpoint

_LOSSES_KEPT = 50  # micro-batches, for the diagnosis of one whose loss is NaN or infinite
_LEAST_SCALE = 1.0  # a loss scale below it does not make gradients fit into fp16; DeepSpeed's own ends a run there


@dataclass(frozen=True)
class BadStep:
    """A step (counted from 0) whose loss is NaN or infinite on some ranks, with its rate and this rank's last images."""

    step: int
    rate: float
    images_NCHW: torch.Tensor
    ranks: list[int]


class Recovery:
    """Gets a run over such steps, or ends it, by `train.on_nan`.

    `written` waits for the checkpoint under way.
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
        written: Callable[[], object],
    ) -> None:
        self._config, self._derived, self._state, self._inputs = config, derived, state, inputs
        self._run_dir, self._device, self._report, self._written = run_dir, device, report, written
        self._losses: deque[torch.Tensor] = deque(maxlen=max(_LOSSES_KEPT, derived.gradient_accumulation_steps))

    def note(self, loss: torch.Tensor) -> None:
        """Keeps a micro-batch's loss, on the device, for the diagnosis."""
        self._losses.append(loss.detach())

    def recover(self, engine: Engine, bad: BadStep) -> Engine:
        """Mends such a step; returns the engine to go on with (a collective). The optimizer has not stepped.

        The clock goes on in any case: a step that is left out is left out for ever, and after a return to a checkpoint
        the images since then are not seen again, as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).

        Raises:
            UserError: the run is to end there, or nothing helps.
        """
        train, state = self._config.train, self._state
        file, non_finite_weights = self._diagnosed(engine, bad)
        on = ", ".join(map(str, bad.ranks))
        what = f"the training loss is NaN or infinite at step {bad.step + 1} (epoch {self._epoch:.2f}) on rank {on}"
        state.non_finite_steps += 1
        if train.on_nan == "skip" and non_finite_weights:
            what += f", and leaving out steps cannot help any more: {non_finite_weights[0]} itself is not finite"
        elif train.on_nan != "stop" and state.non_finite_steps <= train.nan_limit:
            count = f"{state.non_finite_steps} of at most {train.nan_limit}, see {file}"
            if train.on_nan == "skip":
                engine.restore_statistics()
                engine.step(skip=True)
                self._warn(f"{what}: the step is left out ({count})")
                return engine
            self._written()
            newest = newest_checkpoint(self._config, self._run_dir, self._warn)
            if newest is not None:
                engine.close()
                engine = new_engine(self._config, self._derived, self._device, self._warn, checkpoint=newest)
                self._warn(f"{what}: the weights are those of {newest.name} again ({count})")
                return engine
        again = f", {state.non_finite_steps - 1} times before in this run" if state.non_finite_steps > 1 else ""
        raise UserError(
            f"{what}{again}: lower optim.lr (now {self._config.optim.lr:g}), lengthen schedule.warmup_epochs or set "
            f"optim.clip_grad_norm; train.on_nan=skip or rewind goes on. The checkpoints are valid. What the layers "
            f"gave, and for which images, is in {file}."
        )

    def check_scale(self, step: int, reading: Reading, scale: float | None) -> None:
        """Looks whether the loss scale of fp16 still can help, after `step` (counted from 1).

        Raises:
            UserError: gradients overflow however small it is: they are not finite.
        """
        if scale is None or scale >= _LEAST_SCALE or not reading.all_skipped or reading.loss is None:
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

    def _diagnosed(self, engine: Engine, bad: BadStep) -> tuple[Path, list[str]]:
        """Writes what is known of such a step, and names the weights that are not finite (a collective)."""
        file = self._run_dir / "diagnosis" / f"step-{bad.step + 1:07d}.json"
        seed_dropout(self._config, bad.step, self._derived.gradient_accumulation_steps - 1)
        non_finite_weights = engine.non_finite_weights()
        diagnose(
            file,
            {
                "step": bad.step + 1,
                "epoch": self._epoch,
                "learning_rate": bad.rate,
                "precision": self._derived.precision,
                "on_ranks": bad.ranks,
                "weights_that_are_no_numbers": non_finite_weights,
            },
            self._inputs.images(bad.step),
            list(self._losses),
            engine.module,
            lambda: engine.infer(engine.module, bad.images_NCHW),
        )
        self._report(Diagnosed(file))
        return file, non_finite_weights
