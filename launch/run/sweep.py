"""The driver of a hyperparameter sweep: parallel training runs with values from a search space."""

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from launch.cluster.allocation import Resources, machine_resources
from launch.cluster.connect import cluster_resources, connected_ray
from launch.cluster.fork_server import fork_server
from launch.cluster.local_ray import embedded_ray
from launch.cluster.ports import cluster_address
from launch.cluster.search import Trial, boundary_overrides, parse_space, report_evaluation, search, trial_id
from launch.cluster.training import run_training
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
    log: Callable[[str], None],
    warn: Callable[[str], None],
) -> list[Trial]:
    """Runs the trials; returns them, best first.

    Raises:
        UserError: Bad input.
        TrainingError: No trial reached an evaluation.
    """
    search_space = parse_space(space)
    config = read_config(path, overrides)
    check_writable(Path(config.run.output))
    name = str(config.run.name)
    folder, address = Path(config.run.output) / name, cluster_address(address)
    log_file = folder / "logs" / "ray.log"
    with ExitStack() as stack:
        available = machine_resources()
        if address is not None:
            stack.enter_context(connected_ray(address, log_file))
            available = cluster_resources(address)
        for boundary in boundary_overrides(search_space):  # finds errors in the space before a trial starts
            prepared = prepare(read_config(path, [*overrides, *boundary]), available)
        with Tracker(config, folder, name, warn) as parent:
            parent.log_params(config.model_dump(mode="json") | {"space": " ".join(space), "trials": trials})
            if not parent.flush(_FLUSH_S):
                raise UserError(f"MLflow at {redacted(parent.uri)} does not accept records, which the trials need.")
            per_trial = prepared.allocation.total_cpus
            if address is None:
                cpus = max(per_trial, available.cpus) + 1
                stack.enter_context(fork_server(prepared.allocation.device, log_file))
                stack.enter_context(embedded_ray(cpus, log_file))
            max_concurrent = max(1, available.cpus // per_trial)
            if available.gpus:
                max_concurrent = max(1, available.gpus // prepared.derived.workers)
            log(f"{trials} trials of {name}, up to {max_concurrent} at once; parent run in MLflow: {parent.run_id}")
            settings = {
                "path": str(find_config(path).absolute()),
                "overrides": [*overrides, f"run.output={folder}", *_store_overrides(parent.stores)],
                "available": available,
                "parent": parent.run_id,
                "cwd": os.getcwd(),
            }
            evaluations = math.ceil(config.train.epochs / config.eval.every_epochs)
            try:
                return search(
                    trial,
                    settings,
                    search_space,
                    trials=trials,
                    max_concurrent=max_concurrent,
                    evaluations=evaluations,
                    folder=folder,
                )
            finally:
                end_child_runs(parent.uri, str(parent.run_id))


def _store_overrides(stores: Stores) -> list[str]:
    """Returns overrides that set the sweep's stores; trials read a URI with a password from their environment."""
    uris = {"tracking.uri": stores.tracking, "tracking.registry_uri": stores.registry}
    return [f"{key}={uri}" for key, uri in uris.items() if redacted(uri) == uri]


def trial(values: dict[str, Any], settings: dict[str, Any]) -> None:
    """Runs a trial: trains with these values, and reports the evaluations to Ray Tune."""
    os.chdir(settings["cwd"])
    name = f"trial-{trial_id()}"
    overrides = [*settings["overrides"], *(f"{key}={value}" for key, value in values.items()), f"run.name={name}"]
    available: Resources = settings["available"]
    prepared = prepare(read_config(Path(settings["path"]), overrides), available)
    best: dict[float, float] = {}  # by epoch: the better top-1 of the weights and their EMA

    with (
        run_lock(prepared.run_dir, prepared.config),
        Tracker(prepared.config, prepared.run_dir, name, print, settings["parent"]) as tracker,
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
                report_evaluation(best[epoch], result.loss, epoch, len(best))

        run_training(prepared, on_event)
