"""`pipeline.fit`: trains in this process, without Ray, and with MLflow only if tracking is requested."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from pipeline.config import RunConfig
from pipeline.config_fields import Device
from pipeline.data.staging import stage_splits
from pipeline.errors import ConfigError, UserError
from pipeline.evaluation.counts import EvalResult
from pipeline.model.timm_models import check_model
from pipeline.tracking.stores import REGISTRY_VARIABLE, TRACKING_VARIABLE
from pipeline.train.checkpoint import best_checkpoint, checkpoint_root, checkpoints, read_state
from pipeline.train.disk_space import check_disk_space
from pipeline.train.events import Evaluated, Event, Report, Step, Warned
from pipeline.train.process_group import single_process_group
from pipeline.train.progress import Display
from pipeline.train.rank import train_rank
from pipeline.train.run_lock import run_lock
from pipeline.train.setup import RunSetup, check_writable, new_run_name, set_up, with_absolute_paths
from pipeline.train.storage import fetch_checkpoints_or_warn

if TYPE_CHECKING:
    from pipeline.export.tracked import TrackedRun


@dataclass(frozen=True)
class FittedRun:
    """The result of a training run.

    Attributes:
        top1: Top-1 accuracy of the best evaluation, percent.
        top5: Top-5 accuracy of the best evaluation, percent.
        loss: Mean cross-entropy of the best evaluation; None if no output was finite.
        checkpoint: The checkpoint folder of the best evaluation.
        run_dir: The run's folder.
        model_uri: URI of the registered model; None if it was not registered.
        history: Log lines and evaluations since this start, in order.
    """

    top1: float
    top5: float
    loss: float | None
    checkpoint: Path
    run_dir: Path
    model_uri: str | None
    history: tuple[Step | Evaluated, ...]


def fit(config: RunConfig, *, resume: str | Path | None = None, report: Report | None = None) -> FittedRun:
    """Trains to the end of the run on this machine's first GPU, or on its CPU.

    The run folder is `run.output`/`run.name`, in the format of `densenet train`: `fit` resumes from its latest
    checkpoint if there is one, and each of the two resumes runs of the other. A config without `run.name` starts a new
    run. If the config or the environment names a store, MLflow tracks the run and registers its best model.

    Args:
        config: The config, from `pipeline.load_config`.
        resume: Folder, checkpoint or MLflow id of another run, from which a new run starts.
        report: Receives each event when it happens, some from another thread; by default progress is printed.

    Raises:
        UserError: bad input, before training starts; or, during training, an error that the user can fix.
    """
    setup = _set_up(config, resume)
    config, run_dir = setup.config, setup.run_dir
    history: list[Step | Evaluated] = []
    device = torch.device("cuda", 0) if setup.derived.device == "cuda" else torch.device("cpu")
    with ExitStack() as stack:
        stack.enter_context(run_lock(run_dir, config))
        emit = report or stack.enter_context(_printed(setup))

        def warn(text: str) -> None:
            emit(Warned(text))

        for text in setup.warnings:
            warn(text)
        check_disk_space(setup)
        run = stack.enter_context(_tracked(setup, warn)) if _is_tracked(config) else None

        def on_event(event: Event) -> None:
            if isinstance(event, Step | Evaluated):
                history.append(event)
            if run is not None:
                run.on_event(event)
            emit(event)

        stack.enter_context(single_process_group(device))
        train_index, val_index = stage_splits(config.data, setup.train_index, setup.val_index)
        train_rank(
            config,
            setup.derived,
            train_index,
            val_index,
            run_dir=run_dir,
            device=device,
            report=on_event,
            pretrained=setup.pretrained,
            resume=setup.resume,
        )
        fetch_checkpoints_or_warn(config, run_dir, warn)
        registered = None
        if run is not None:
            run.attach_curves()
            _, registered = run.register()
    best = EvalResult(**read_state(checkpoints(checkpoint_root(run_dir))[-1])["best"])
    return FittedRun(
        top1=best.top1,
        top5=best.top5,
        loss=best.loss,
        checkpoint=best_checkpoint(run_dir),
        run_dir=run_dir,
        model_uri=None if registered is None else registered.uri,
        history=tuple(history),
    )


def _set_up(config: RunConfig, resume: str | Path | None) -> RunSetup:
    check_model(config)
    name = config.run.name or new_run_name(config.model.name)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    config = with_absolute_paths(config, Path.cwd())
    check_writable(Path(config.run.output))
    workers, cpus = config.cluster.workers, config.cluster.cpus_per_worker
    warnings = []
    if workers not in ("auto", 1):
        warnings.append(f"cluster.workers={workers} has no effect: pipeline.fit trains in one process")
    return set_up(
        config,
        device=_device(config),
        workers=1,
        cpus_per_worker=len(os.sched_getaffinity(0)) if cpus == "auto" else cpus,
        embedded=True,
        resume=None if resume is None else str(resume),
        warnings=warnings,
    )


def _device(config: RunConfig) -> Device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda needs GPUs, and this machine has none: set device=auto or device=cpu.")
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _is_tracked(config: RunConfig) -> bool:
    variables = any(os.environ.get(name) for name in (TRACKING_VARIABLE, REGISTRY_VARIABLE))
    tracking = config.tracking
    return variables or tracking.uri is not None or tracking.registry_uri is not None or bool(tracking.custom)


def _tracked(setup: RunSetup, warn: Callable[[str], None]) -> "AbstractContextManager[TrackedRun]":
    try:
        from pipeline.export.tracked import tracked  # imported here: MLflow is optional without tracking
    except ModuleNotFoundError as error:
        raise UserError(
            f"tracking.uri, tracking.registry_uri or their environment variables name a store, or tracking.custom a "
            f"tracker; this needs the package {error.name}, which is not installed: pip install mlflow, or unset them."
        ) from error
    return tracked(setup, warn)


@contextmanager
def _printed(setup: RunSetup) -> Iterator[Report]:
    """Prints events as `densenet train` does: a live progress line in a terminal, plain lines elsewhere."""
    derived = setup.derived
    with Display(Console(), setup.config.train.epochs, derived.total_steps, derived.workers) as display:
        display.line(f"training {setup.config.run.name} in {setup.run_dir}")
        yield display.on_event
