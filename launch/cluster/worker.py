"""The function that every Ray Train worker runs, wherever the cluster is."""

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
import ray.train.torch

from launch.cluster.gauges import Gauges
from pipeline.config import RunConfig
from pipeline.data.index import DatasetIndex
from pipeline.data.staging import stage
from pipeline.derived import Derived, derive_for_workers
from pipeline.errors import DataError, UserError
from pipeline.model.pretrained import Pretrained
from pipeline.plugins import module_name
from pipeline.train.events import Event, Failed, Report, Skipped, Warned, WorkersStarted
from pipeline.train.run_lock import PROBE

_PROBED = 1000  # images or shards that each node looks for before training


@dataclass(frozen=True)
class Task:
    """What a worker is to do.

    `resume` is another run's checkpoint to go on from, where this run has none of its own. The indexes are Ray's
    references to a `DatasetIndex`; `hub` is the handle of a `EventChannel`, `code` the `code_version` of the driver.
    """

    config: RunConfig
    derived: Derived
    sources: Pretrained
    resume: Path | None
    run_dir: Path
    train_index: Any
    val_index: Any
    code: str
    hub: Any


def train_worker(given: dict[str, Task]) -> None:
    """Trains one rank; its `task` comes from `launch.cluster.training.run`.

    A `UserError` is told to the hub and not to Ray alone: a restart would only meet it again, so the restarted
    workers find it there and return at once.
    """
    task = given["task"]
    hub = task.hub
    if ray.get(hub.error.remote()) is not None:
        return
    context = ray.train.get_context()
    rank = context.get_world_rank()
    _log_to(task.run_dir / "logs" / f"rank{rank}.log")
    gauges = Gauges(str(task.config.run.name))

    def report(event: Event) -> None:
        if isinstance(event, Skipped | Warned):
            print(event.message)
        if rank == 0 or isinstance(event, Skipped):
            hub.push.remote(event)
        if rank == 0:
            gauges.set(event)

    report(WorkersStarted(context.get_world_size()))
    try:
        _train(task, report)
    except UserError as error:
        ray.get(hub.push.remote(Failed(str(error))))
        raise


def _train(task: Task, report: Report) -> None:
    from pipeline.train.rank import train_rank  # torch, timm and DALI take seconds to import

    config, run_dir, derived, context = task.config, task.run_dir, task.derived, ray.train.get_context()
    if context.get_world_size() != derived.workers:
        derived = derive_for_workers(derived, config, context.get_world_size())
    _check_code(task.code, config.run.plugins)
    _check_output(config, run_dir)
    train_index, val_index = (_on_this_node(config, ray.get(index)) for index in (task.train_index, task.val_index))
    train_rank(
        config,
        derived,
        train_index,
        val_index,
        run_dir=run_dir,
        device=ray.train.torch.get_device(),
        report=report,
        sources=task.sources,
        resume=task.resume,
        should_stop=_stop_asked(task.hub),
        should_save=_preemption(report),
        hang_timeout_s=config.cluster.hang_timeout_s,
    )


def code_version(plugins: Sequence[str]) -> str:
    """A hash of this project's code, and of the modules of plugins, as this process finds it."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for folder in ("launch", "pipeline"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    for plugin in plugins:
        digest.update(Path(str(sys.modules[module_name(plugin)].__file__)).read_bytes())
    return digest.hexdigest()[:12]


def _node() -> str:
    return f"node {ray.util.get_node_ip_address()}"


def _check_code(expected: str, plugins: Sequence[str]) -> None:
    if code_version(plugins) != expected:
        raise UserError(
            f"{_node()} has other code in {Path(__file__).parents[2]} or of a plugin than the driver: bring all "
            f"nodes to the same version, or submit the run as a job, which carries its code."
        )


def _check_output(config: RunConfig, run_dir: Path) -> None:
    """Raises where this node sees no run folder of the driver's, and checkpoints would be lost with their nodes."""
    if not (run_dir / PROBE).is_file() and config.checkpoint.storage is None:
        raise UserError(
            f"{_node()} does not see the driver's files in run.output={config.run.output}: put it on a file system "
            f"that all nodes share under one path, or set checkpoint.storage to an address that all nodes reach."
        )


def _on_this_node(config: RunConfig, index: DatasetIndex) -> DatasetIndex:
    """The index of the data as this node reads them: where they are, or of the copy on its own disk.

    Raises:
        DataError: this node sees other data than the driver, or none.
    """
    if config.data.stage is not None:
        return stage(index, str(config.data.root), Path(config.data.stage))
    reason = index.find_difference(_PROBED, compare_sizes=config.data.on_corrupt == "error")
    if reason is not None:
        raise DataError(
            f"{_node()} does not see the data that the driver sees in data.root={config.data.root}: {reason}. Put them "
            f"where all nodes see them under one path, or set data.stage."
        )
    return index


def _stop_asked(hub: Any) -> Callable[[], bool]:
    """A function that says whether the driver wants the run to stop, as the hub knew some moments ago; never waits."""
    asked = hub.stop_asked.remote()

    def look() -> bool:
        nonlocal asked
        if not ray.wait([asked], timeout=0)[0]:
            return False
        answer = ray.get(asked)
        asked = hub.stop_asked.remote()
        return answer

    return look


def _preemption(report: Report) -> Callable[[], bool]:
    """A function that is true once when Ray tells that a node of the run will be taken away; a collective."""
    told = False

    def look() -> bool:
        nonlocal told
        if told or ray.train.get_preemption_info() is None:
            return False
        told = True
        report(Warned("a node of this run will be taken away; a checkpoint is written now"))
        return True

    return look


def _log_to(file: Path) -> None:
    """Sends this process's standard output and error, those of C libraries too, to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):  # file names, for one, in whatever locale the node has
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
