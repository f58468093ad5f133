"""The function that every Ray Train worker runs, wherever the cluster is."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

from pipeline.config import RunConfig
from pipeline.data.index import DatasetIndex
from pipeline.data.staging import stage
from pipeline.errors import UserError


def train_worker(task: dict[str, Any]) -> None:
    """Trains one rank; `task` comes from `launch.cluster.run`.

    A `UserError` is told to the hub and not to Ray alone: a restart would only meet it again, so the restarted
    workers find it there and return at once.
    """
    hub = task["hub"]
    if ray.get(hub.error.remote()) is not None:
        return
    context = ray.train.get_context()
    rank = context.get_world_rank()
    _log_to(task["run_dir"] / "logs" / f"rank{rank}.log")

    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "skipped":
            print(event["message"])
        if rank == 0 or event["kind"] == "skipped":
            hub.push.remote(event)

    report({"kind": "workers_started"})
    try:
        _train(task, report)
    except UserError as error:
        ray.get(hub.push.remote({"kind": "error", "message": str(error)}))
        raise


def _train(task: dict[str, Any], report: Any) -> None:
    import torch

    from pipeline.train.state import newest_checkpoint
    from pipeline.train.trainer import Trainer
    from pipeline.train.watchdog import Watchdog

    train_index = _on_this_node(task["config"], ray.get(task["train_index"]))
    val_index = _on_this_node(task["config"], ray.get(task["val_index"]))
    torch.set_num_threads(task["derived"].cpus_per_worker)
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    newest = newest_checkpoint(
        task["config"], task["run_dir"], lambda text: report({"kind": "warning", "message": text})
    )
    with Watchdog(task["config"].cluster.hang_timeout_s) as watchdog:
        trainer = Trainer(
            task["config"],
            task["derived"],
            train_index,
            val_index,
            task["run_dir"],
            device,
            report,
            task["sources"],
            newest or task["resume"],
            _stop_asked(task["hub"]),
            _preemption(report),
            watchdog.alive,
        )
        trainer.fit()


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


def _on_this_node(config: RunConfig, index: DatasetIndex) -> DatasetIndex:
    """The index of the data as this node reads them: where they are, or of the copy on its own disk."""
    if config.data.stage is None:
        return index
    return stage(index, str(config.data.root), Path(config.data.stage))


def _preemption(report: Callable[[dict[str, Any]], None]) -> Callable[[], bool]:
    """A function that is true once when Ray tells that a node of the run will be taken away; a collective."""
    told = False

    def look() -> bool:
        nonlocal told
        if told or ray.train.get_preemption_info() is None:
            return False
        told = True
        report({"kind": "warning", "message": "a node of this run will be taken away; a checkpoint is written now"})
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
