"""Events of a training run: plain dataclasses, matched by type (`match event: case Step(loss=loss): ...`).

They travel through Ray, so they hold only plain values. `samples_seen` counts training samples since the start of the
run, over all workers; `epoch` is the same in passes over the training split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.evaluation.counts import EvalResult

Weights = Literal["raw", "ema"]


@dataclass(frozen=True)
class WorkersStarted:
    """Sent when all workers have started, also after each restart; `workers` is their number."""

    workers: int


@dataclass(frozen=True)
class Resumed:
    """Sent when training resumes from a checkpoint, at `samples_seen`."""

    samples_seen: int
    checkpoint: Path


@dataclass(frozen=True)
class FirstStep:
    """Sent after the first optimizer step since the start or a restart."""

    samples_seen: int


@dataclass(frozen=True)
class Step:
    """Sent every `train.log_every_steps` optimizer steps, and at the last one: metrics since the previous `Step`.

    Attributes:
        step: Optimizer steps done, counted from 1.
        samples_seen: Samples seen, over all workers.
        epoch: Passes over the training split, with fraction.
        lr: The learning rate of the last step.
        loss: Mean training loss over all ranks; None if all of these steps were skipped.
        skipped_steps: Steps skipped because of a non-finite loss or overflowed fp16 gradients.
        img_per_s: Images per second, over all workers.
        img_per_s_worker: Images per second and worker.
        step_s: Seconds per optimizer step.
        data_wait: Fraction of the time that the slowest worker waited for data, in [0, 1].
        eta_s: Estimated seconds left in training.
        grad_norm: L2 norm of the last step's gradient before clipping, where it is known.
        loss_scale: The loss scale of fp16.
        gpu_memory_gb: Peak allocated GPU memory of rank 0, in GB (1e9 bytes).
        mfu: Model FLOPs utilization of rank 0, in [0, 1].
        slow_ranks: How many ranks were slow in this interval and the one before (`meter.SLOW_RATIO`).
        slowest_rank: The rank that took longest until the end of its forward passes.
        slowest_rank_ratio: Its time over the median rank's, at least 1.
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
    slow_ranks: int = 0
    slowest_rank: int = 0
    slowest_rank_ratio: float = 1.0


@dataclass(frozen=True)
class Evaluated:
    """Sent after an evaluation of the weights (`raw`) or of their exponential moving average (`ema`).

    `img_per_s` counts images per second over all workers.
    """

    weights: Weights
    samples_seen: int
    epoch: float
    img_per_s: float
    result: EvalResult


@dataclass(frozen=True)
class Saved:
    """Sent when a checkpoint is committed: training waited `stall_s` seconds, a thread wrote for `write_s` seconds."""

    samples_seen: int
    checkpoint: Path
    stall_s: float
    write_s: float


@dataclass(frozen=True)
class Skipped:
    """Sent at the next log line after a corrupt training image was replaced by another one.

    `sample` is the image's position in the index; `message` names the image and its problem.
    """

    sample: int
    message: str


@dataclass(frozen=True)
class Diagnosed:
    """Sent when a diagnosis file of a NaN or infinite loss is written."""

    file: Path


@dataclass(frozen=True)
class Profiled:
    """Sent when the profiler's trace is written."""

    file: Path


@dataclass(frozen=True)
class Warned:
    """Sent for a problem that the user may want to fix; the run continues."""

    message: str


@dataclass(frozen=True)
class WorkersLost:
    """Sent when workers failed, with the cause by rank; all workers restart."""

    causes: dict[int, str]


@dataclass(frozen=True)
class Failed:
    """Sent when a worker met an error that the user can fix; the run ends."""

    message: str


@dataclass(frozen=True)
class Stopped:
    """Sent when the run stops on request, after a checkpoint; `signal` is the signal's number, if there was one."""

    samples_seen: int
    signal: int | None = None


@dataclass(frozen=True)
class Trained:
    """Sent after the last step; `img_per_s` is the mean training throughput over all workers."""

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
