"""`pipeline.fit`: a training in this process, without Ray, and without MLflow unless tracking is asked for."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from pipeline.config import Device, RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.evaluation.counts import EvalResult
from pipeline.model.timm_models import check_model
from pipeline.tracking.stores import REGISTRY_VARIABLE, TRACKING_VARIABLE
from pipeline.train.alone import alone
from pipeline.train.checkpoint import best_checkpoint, checkpoint_root, checkpoints, read_state
from pipeline.train.disk_space import check_disk_space
from pipeline.train.events import Evaluated, Event, Report, Step, Warned
from pipeline.train.progress import Display
from pipeline.train.rank import train_rank
from pipeline.train.run_lock import run_lock
from pipeline.train.setup import RunSetup, absolute, check_writable, new_name, set_up
from pipeline.train.storage import fetch_best

if TYPE_CHECKING:
    from pipeline.export.tracked import TrackedRun


@dataclass(frozen=True)
class FittedRun:
    """What came of a training.

    `top1` and `top5` are percentages and `loss` the mean cross-entropy (None where no output was finite) of the run's
    best evaluation, `checkpoint` is the folder of its weights. `model_uri` is the registered model's, None where it was
    not registered. `history` are the log lines and evaluations since this start, in order.
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

    The run lies in `run.output`/`run.name`, as one of `densenet train`: it goes on from its newest checkpoint where it
    has one, and each of the two goes on where the other has stopped. A config without `run.name` begins a new run. It
    is recorded in MLflow, and its best model registered, where the config or the environment names a store.

    Args:
        config: What `pipeline.load_config` has read.
        resume: Another run's folder, checkpoint or MLflow id that a new run goes on from.
        report: Gets each event as it comes, some in a thread; by default progress is printed.

    Raises:
        UserError: bad input, before any training; or what the user can fix in the middle of it.
    """
    setup = _set_up(config, resume)
    config, run_dir = setup.config, setup.run_dir
    history: list[Step | Evaluated] = []
    device = torch.device("cuda", 0) if setup.derived.device == "cuda" else torch.device("cpu")
    with ExitStack() as stack:
        stack.enter_context(run_lock(run_dir, config))
        tell = report or stack.enter_context(_printed(setup))

        def warn(text: str) -> None:
            tell(Warned(text))

        for text in setup.warnings:
            warn(text)
        check_disk_space(setup)
        run = stack.enter_context(_tracked(setup, warn)) if _tracking_asked(config) else None

        def on_event(event: Event) -> None:
            if isinstance(event, Step | Evaluated):
                history.append(event)
            if run is not None:
                run.on_event(event)
            tell(event)

        stack.enter_context(alone(device))
        train_rank(
            config,
            setup.derived,
            setup.train_index,
            setup.val_index,
            run_dir=run_dir,
            device=device,
            report=on_event,
            sources=setup.sources,
            resume=setup.resume,
        )
        fetch_best(config, run_dir, warn)
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
    name = config.run.name or new_name(config.model.name)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    config = absolute(config, Path.cwd())
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


def _tracking_asked(config: RunConfig) -> bool:
    variables = any(os.environ.get(name) for name in (TRACKING_VARIABLE, REGISTRY_VARIABLE))
    tracking = config.tracking
    return variables or tracking.uri is not None or tracking.registry_uri is not None or bool(tracking.custom)


def _tracked(setup: RunSetup, warn: Callable[[str], None]) -> "AbstractContextManager[TrackedRun]":
    try:
        from pipeline.export.tracked import tracked  # MLflow need not be there where it is not asked for
    except ModuleNotFoundError as error:
        raise UserError(
            f"tracking.uri, tracking.registry_uri or their variables name a store, or tracking.custom a tracker, which "
            f"needs the package {error.name}, that is not installed: pip install mlflow, or leave them out."
        ) from error
    return tracked(setup, warn)


@contextmanager
def _printed(setup: RunSetup) -> Iterator[Report]:
    """Prints events as `densenet train` does: a line that changes in a terminal, plain lines elsewhere."""
    derived = setup.derived
    with Display(Console(), setup.config.train.epochs, derived.total_steps, derived.workers) as display:
        display.line(f"training {setup.config.run.name} in {setup.run_dir}")
        yield display.on_event
