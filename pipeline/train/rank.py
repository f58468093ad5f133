"""Trains one rank of a run, from its latest checkpoint to the end, under any launcher."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from pipeline.config import RunConfig
from pipeline.data.index import DatasetIndex
from pipeline.derived import Derived
from pipeline.model.pretrained import NO_PRETRAINED, Pretrained
from pipeline.train.batch_size_finder import find_batch_size
from pipeline.train.events import Report, Warned
from pipeline.train.inputs import Inputs
from pipeline.train.state import latest_checkpoint
from pipeline.train.trainer import Trainer
from pipeline.train.watchdog import Watchdog


def train_rank(
    config: RunConfig,
    derived: Derived,
    train_index: DatasetIndex,
    val_index: DatasetIndex,
    *,
    run_dir: Path,
    device: torch.device,
    report: Report,
    pretrained: Pretrained = NO_PRETRAINED,
    resume: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    should_save: Callable[[], bool] = lambda: False,
    hang_timeout_s: float | None = None,
) -> None:
    """Trains in an existing process group; see `pipeline.train.trainer.Trainer`.

    The run resumes from its own latest valid checkpoint, or else from `resume`. With `hang_timeout_s`, a process
    without a batch for so many seconds writes its threads' stacks and ends.

    Raises:
        UserError: an error that the user can fix.
    """
    torch.set_num_threads(derived.cpus_per_worker)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def warn(message: str) -> None:
        report(Warned(message))

    latest = latest_checkpoint(config, run_dir, warn)
    with nullcontext() if hang_timeout_s is None else Watchdog(hang_timeout_s) as watchdog:
        derived = find_batch_size(config, derived, device, warn)
        Trainer(
            config,
            derived,
            Inputs(config, derived, train_index, val_index, device),
            run_dir=run_dir,
            device=device,
            report=report,
            pretrained=pretrained,
            resume=latest or resume,
            should_stop=should_stop,
            should_save=should_save,
            heartbeat=watchdog.heartbeat if watchdog is not None else lambda: None,
        ).fit()
