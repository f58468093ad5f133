"""The training function of every Ray Train worker."""

import hashlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train

from pipeline.config import RunConfig
from pipeline.data.index import DatasetIndex
from pipeline.data.staging import stage_splits
from pipeline.derived import Derived, derive_for_workers
from pipeline.errors import DataError, UserError
from pipeline.model.pretrained import Pretrained
from pipeline.plugins import module_name
from pipeline.train.events import Event, Failed, Report, Skipped, Warned, WorkersStarted
from pipeline.train.run_lock import PROBE

_CHECKED_FILES = 1000  # images or shards whose presence each node checks before training


@dataclass(frozen=True)
class Task:
    """Settings of a worker.

    Attributes:
        resume: Another run's checkpoint to resume from if this run has none.
        train_index: Ray reference to a `DatasetIndex`.
        val_index: Ray reference to a `DatasetIndex`.
        code: The driver's `code_version`.
        channel: Handle of the `EventChannel`.
        preemptible: Whether a node of the run can be preempted: not on the local Ray of one run.
    """

    config: RunConfig
    derived: Derived
    sources: Pretrained
    resume: Path | None
    run_dir: Path
    train_index: Any
    val_index: Any
    code: str
    channel: Any
    preemptible: bool


def train_worker(train_loop_config: dict[str, Task]) -> None:
    """Trains one rank; `launch.cluster.training.run_training` sets the `task`.

    Reports a `UserError` to the event channel as well as to Ray. A restart would meet the same error, so restarted
    workers that find one there return at once.
    """
    task = train_loop_config["task"]
    channel = task.channel
    if ray.get(channel.error.remote()) is not None:
        return
    context = ray.train.get_context()
    rank = context.get_world_rank()
    _redirect_output(task.run_dir / "logs" / f"rank{rank}.log")

    def report(event: Event) -> None:
        if isinstance(event, Skipped | Warned):
            print(event.message)
        if rank == 0 or isinstance(event, Skipped):
            channel.push.remote(event)

    report(WorkersStarted(context.get_world_size()))
    try:
        _train(task, report)
    except UserError as error:
        ray.get(channel.push.remote(Failed(str(error))))
        raise


def _train(task: Task, report: Report) -> None:
    import ray.train.torch  # torch, timm and DALI take seconds to import

    from pipeline.train.rank import train_rank

    config, run_dir, derived, context = task.config, task.run_dir, task.derived, ray.train.get_context()
    if context.get_world_size() != derived.workers:
        derived = derive_for_workers(derived, config, context.get_world_size())
    _check_code(task.code, config.run.plugins)
    _check_output(config, run_dir)
    train_index, val_index = _node_indexes(config, ray.get(task.train_index), ray.get(task.val_index))
    train_rank(
        config,
        derived,
        train_index,
        val_index,
        run_dir=run_dir,
        device=ray.train.torch.get_device(),
        report=report,
        pretrained=task.sources,
        resume=task.resume,
        # Asked by one rank for all, so that the channel's load does not grow with the ranks.
        should_stop=_stop_check(task.channel) if context.get_world_rank() == 0 else lambda: False,
        should_save=_preemption_check(report) if task.preemptible else lambda: False,
        hang_timeout_s=config.cluster.hang_timeout_s,
    )


def code_version(plugins: Sequence[str]) -> str:
    """Returns a hash of this project's code and of the plugins' modules on this node."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for folder in ("launch", "pipeline"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    for plugin in plugins:
        digest.update(Path(str(sys.modules[module_name(plugin)].__file__)).read_bytes())
    return digest.hexdigest()[:12]


def _node_name() -> str:
    return f"node {ray.util.get_node_ip_address()}"


def _check_code(expected: str, plugins: Sequence[str]) -> None:
    if code_version(plugins) != expected:
        raise UserError(
            f"{_node_name()} has other code in {Path(__file__).parents[2]} or of a plugin than the driver: install the "
            f"same version on all nodes, or submit the run as a job, which brings its code."
        )


def _check_output(config: RunConfig, run_dir: Path) -> None:
    """Raises `UserError` if this node does not see the driver's run folder, and would lose checkpoints with a node."""
    if not (run_dir / PROBE).is_file() and config.checkpoint.storage is None:
        raise UserError(
            f"{_node_name()} does not see the driver's files in run.output={config.run.output}: put it on a file "
            f"system that all nodes share under one path, or set checkpoint.storage to a URI that all nodes can reach."
        )


def _node_indexes(
    config: RunConfig, train_index: DatasetIndex, val_index: DatasetIndex
) -> tuple[DatasetIndex, DatasetIndex]:
    """Returns the indexes of the data that this node reads: in data.root, or the copy on its own disk (data.stage).

    Raises:
        DataError: This node sees no data, or other data than the driver.
    """
    if config.data.stage is not None:
        return stage_splits(config.data, train_index, val_index)
    for index in (train_index, val_index):
        reason = index.find_difference(_CHECKED_FILES, compare_sizes=config.data.on_corrupt == "error")
        if reason is not None:
            raise DataError(
                f"{_node_name()} does not see the data that the driver sees in data.root={config.data.root}: {reason}. "
                f"Put the data under one path that all nodes see, or set data.stage."
            )
    return train_index, val_index


def _stop_check(channel: Any) -> Callable[[], bool]:
    """Returns a function that checks, without waiting, whether the driver requested a stop moments ago."""
    pending = channel.stop_requested.remote()

    def stop_requested() -> bool:
        nonlocal pending
        if not ray.wait([pending], timeout=0)[0]:
            return False
        requested = ray.get(pending)
        pending = channel.stop_requested.remote()
        return requested

    return stop_requested


def _preemption_check(report: Report) -> Callable[[], bool]:
    """Returns a function that is true once, when Ray announces the preemption of a node; all ranks call it together."""
    reported = False

    def preempted() -> bool:
        nonlocal reported
        if reported or ray.train.get_preemption_info() is None:
            return False
        reported = True
        report(Warned("a node of this run will be preempted; a checkpoint is written now"))
        return True

    return preempted


def _redirect_output(file: Path) -> None:
    """Appends this process's standard output and error, those of C libraries too, to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):  # file names, for example, in the node's locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
