"""What a training tells while it goes on: values, matched by their types (`match event: case Step(loss=loss): ...`).

They travel through Ray, so they hold plain values alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.evaluation.counts import EvalResult

Weights = Literal["raw", "ema"]


@dataclass(frozen=True)
class WorkersStarted:
    """All workers of the run run, so many; again after each restart."""

    workers: int


@dataclass(frozen=True)
class Resumed:
    """Training goes on at so many samples, from a checkpoint."""

    samples_seen: int
    checkpoint: Path


@dataclass(frozen=True)
class FirstStep:
    """The first step since the start, or a restart, is done."""

    samples_seen: int


@dataclass(frozen=True)
class Step:
    """A log line, after the optimizer's `step` (counted from 1): of all steps since the line before it.

    `loss` is the mean over all ranks; None where all of these steps were skipped, of which there were `skipped_steps`.
    `lr` is the rate of the last step, and `grad_norm` the L2 norm of its gradient before clipping, where it is known.
    `img_per_s` is of all workers together, `img_per_s_worker` of one; `data_wait` in [0, 1] is the time that the
    slowest worker waited for data, and `eta_s` the seconds left in training. `loss_scale` is that of fp16,
    `gpu_memory_gb` (1e9 bytes) and `mfu` (model FLOPs utilization in [0, 1]) are rank 0's.
    """

    step: int
    samples_seen: int
    epoch: float
    lr: float
    loss: float | None
    skipped_steps: int
    img_per_s: float
    img_per_s_worker: float
    step_s: float
    data_wait: float
    eta_s: float
    grad_norm: float | None = None
    loss_scale: float | None = None
    gpu_memory_gb: float | None = None
    mfu: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of the weights (`raw`) or of their average (`ema`); `img_per_s` is of all workers together."""

    weights: Weights
    samples_seen: int
    epoch: float
    img_per_s: float
    result: EvalResult


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete; training stood still for `stall_s`, a thread wrote it in `write_s` seconds."""

    samples_seen: int
    checkpoint: Path
    stall_s: float
    write_s: float


@dataclass(frozen=True)
class Skipped:
    """A corrupt training image, a sample of the index, was replaced by another; `message` names it and its problem."""

    sample: int
    message: str


@dataclass(frozen=True)
class Diagnosed:
    """What is known of a step whose loss was NaN or infinite is in a file."""

    file: Path


@dataclass(frozen=True)
class Profiled:
    """The trace of some steps is in a file."""

    file: Path


@dataclass(frozen=True)
class Warned:
    """Something that the user may want to fix; the run goes on."""

    message: str


@dataclass(frozen=True)
class WorkersLost:
    """Workers were lost, by rank with the cause; all are started again."""

    causes: dict[int, str]


@dataclass(frozen=True)
class Failed:
    """A worker met an error that the user can fix; the run ends."""

    message: str


@dataclass(frozen=True)
class Stopped:
    """The run was asked to stop, by a signal's number where it was one, and has written a checkpoint."""

    samples_seen: int
    signal: int | None = None


@dataclass(frozen=True)
class Trained:
    """The last step is done; the mean speed of training alone, of all workers together."""

    img_per_s: float


Event = (
    WorkersStarted
    | Resumed
    | FirstStep
    | Step
    | Evaluated
    | Saved
    | Skipped
    | Diagnosed
    | Profiled
    | Warned
    | WorkersLost
    | Failed
    | Stopped
    | Trained
)
Report = Callable[[Event], None]
