"""The driver of a sweep: several trainings with other values, as many at once as there is room for."""

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from launch.cluster.allocation import Resources, this_machine
from launch.cluster.connect import embedded, joined, offered_by_cluster
from launch.cluster.ports import cluster_address, free_port
from launch.cluster.search import Trial, edges, parse_space, search, tell, trial_id
from launch.cluster.training import run
from launch.run.prepare import prepare, read_config
from pipeline.config_file import find_config
from pipeline.errors import UserError
from pipeline.tracking.queries import end_child_runs
from pipeline.tracking.run import Tracker
from pipeline.tracking.stores import Stores, redacted
from pipeline.train.events import Evaluated, Event
from pipeline.train.recorder import Recorder
from pipeline.train.run_lock import run_lock
from pipeline.train.setup import check_writable

_FLUSH_S = 60.0


def sweep(
    path: Path,
    overrides: list[str],
    space: list[str],
    trials: int,
    address: str | None,
    told: Callable[[str], None],
    warn: Callable[[str], None],
) -> list[Trial]:
    """Runs the trials, and returns them, the best first.

    Raises:
        UserError: bad input.
        TrainingError: no trial came to an evaluation.
    """
    searched = parse_space(space)
    config = read_config(path, overrides)
    check_writable(Path(config.run.output))
    name = str(config.run.name)
    folder, address = Path(config.run.output) / name, cluster_address(address)
    log_file = folder / "logs" / "ray.log"
    with ExitStack() as stack:
        offered = this_machine()
        if address is not None:
            stack.enter_context(joined(address, log_file))
            offered = offered_by_cluster(address)
        for edge in edges(searched):  # what is wrong with the space is known before anything runs
            prepared = prepare(read_config(path, [*overrides, *edge]), offered)
        with Tracker(config, folder, name, warn) as parent:
            parent.log_params(config.model_dump(mode="json") | {"space": " ".join(space), "trials": trials})
            if not parent.flush(_FLUSH_S):
                raise UserError(f"MLflow at {redacted(parent.uri)} does not take records, which the trials need.")
            per_trial = prepared.derived.workers * prepared.derived.cpus_per_worker
            if address is None:
                cpus = max(per_trial, offered.cpus) + 1
                stack.enter_context(embedded(cpus, free_port(), log_file))
            most = max(1, offered.cpus // per_trial)
            if offered.gpus:
                most = max(1, offered.gpus // prepared.derived.workers)
            told(f"{trials} trials of {name}, up to {most} at once; MLflow's run {parent.run_id} holds them")
            task = {
                "path": str(find_config(path).absolute()),
                "overrides": [*overrides, f"run.output={folder}", *_addresses(parent.stores)],
                "offered": offered,
                "parent": parent.run_id,
                "cwd": os.getcwd(),
            }
            evaluations = math.ceil(config.train.epochs / config.eval.every_epochs)
            try:
                return search(
                    trial, task, searched, trials=trials, at_once=most, evaluations=evaluations, folder=folder
                )
            finally:
                end_child_runs(parent.uri, str(parent.run_id))


def _addresses(stores: Stores) -> list[str]:
    """Overrides by which trials use the stores of the sweep; one with a password is in their environment already."""
    addresses = {"tracking.uri": stores.tracking, "tracking.registry_uri": stores.registry}
    return [f"{key}={uri}" for key, uri in addresses.items() if redacted(uri) == uri]


def trial(values: dict[str, Any], task: dict[str, Any]) -> None:
    """One trial: a training with these values, whose evaluations Ray Tune hears of."""
    os.chdir(task["cwd"])
    name = f"trial-{trial_id()}"
    given = [f"{key}={value}" for key, value in values.items()]
    offered: Resources = task["offered"]
    prepared = prepare(read_config(Path(task["path"]), [*task["overrides"], *given, f"run.name={name}"]), offered)
    best: dict[float, float] = {}  # by epoch: of the weights and their average, the better one's accuracy

    with (
        run_lock(prepared.run_dir, prepared.config),
        Tracker(prepared.config, prepared.run_dir, name, print, task["parent"]) as tracker,
    ):
        tracker.log_params(prepared.config.model_dump(mode="json"))
        recorder = Recorder(tracker, prepared.config, prepared.run_dir)
        last = "raw" if prepared.config.ema.decay is None else "ema"

        def on_event(event: Event) -> None:
            recorder.on_event(event)
            if not isinstance(event, Evaluated):
                return
            result, epoch = event.result, event.epoch
            best[epoch] = max(result.top1, best.get(epoch, 0.0))
            if event.weights == last:
                tracker.flush(_FLUSH_S)  # the trial's process may be ended at once
                tell(best[epoch], result.loss, epoch, len(best))

        run(prepared, on_event)
