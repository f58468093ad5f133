"""`densenet sweep`: several trainings with other values, the poor ones ended early, by Ray Tune and ASHA."""

import math
import os
import re
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from rich.console import Console

from launch.cli.common.output import outlive_readers
from launch.cli.common.tables import print_table
from launch.cluster.capacity import Resources, this_machine
from launch.cluster.net import cluster_address, free_port
from launch.cluster.training import embedded, joined, offered_by_cluster, run
from launch.run.claim import claimed
from launch.run.prepare import check_writable, prepare, read_config
from launch.run.recorder import Recorder
from pipeline.config_file import find_config
from pipeline.errors import TrainingError, UserError
from pipeline.tracking.look import end_children
from pipeline.tracking.run import Tracker
from pipeline.tracking.stores import Stores, shown

_FORM = re.compile(r"(?P<key>[\w.]+)=(?P<kind>log|uniform|choice)\((?P<values>.*)\)")
_TRIAL_CPUS = 0.01  # a trial's own process only waits
_FLUSH_S = 60.0


def sweep_command(
    console: Console, path: Path, overrides: list[str], space: list[str], trials: int, address: str | None
) -> None:
    """Runs the trials, as many at once as there is room for, and prints them, the best first.

    Raises:
        UserError: bad input.
        TrainingError: no trial came to an evaluation.
    """
    outlive_readers(console)
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
        for edge in _edges(searched):  # what is wrong with the space is known before anything runs
            prepared = prepare(read_config(path, [*overrides, *edge]), offered)
        with Tracker(config, folder, name, lambda text: console.print(text, style="yellow")) as parent:
            parent.params(config.model_dump(mode="json") | {"space": " ".join(space), "trials": trials})
            if not parent.flush(_FLUSH_S):
                raise UserError(f"MLflow at {shown(parent.uri)} does not take records, which the trials need.")
            per_trial = prepared.derived.workers * prepared.derived.cpus_per_worker
            if address is None:
                cpus = max(per_trial, offered.cpus) + 1
                stack.enter_context(embedded(cpus, free_port(), log_file))
            most = max(1, offered.cpus // per_trial)
            if offered.gpus:
                most = max(1, offered.gpus // prepared.derived.workers)
            console.print(
                f"{trials} trials of {name}, up to {most} at once; MLflow's run {parent.run_id} holds them",
                soft_wrap=True,
            )
            task = {
                "path": str(find_config(path).absolute()),
                "overrides": [*overrides, f"run.output={folder}", *_addresses(parent.stores)],
                "offered": offered,
                "parent": parent.run_id,
                "cwd": os.getcwd(),
            }
            evaluations = math.ceil(config.train.epochs / config.eval.every_epochs)
            tuner = tune.Tuner(
                tune.with_resources(tune.with_parameters(trial, task=task), {"CPU": _TRIAL_CPUS}),
                param_space=searched,
                tune_config=tune.TuneConfig(
                    metric="top1",
                    mode="max",
                    num_samples=trials,
                    max_concurrent_trials=most,
                    # A trial that comes to its end ends by itself, not by max_t.
                    scheduler=ASHAScheduler(time_attr="evaluations", max_t=evaluations + 1, grace_period=1),
                ),
                run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
            )
            try:
                results = tuner.fit()
            finally:
                end_children(parent.uri, str(parent.run_id))
            _print(console, path, overrides, results)


def _addresses(stores: Stores) -> list[str]:
    """Overrides by which trials use the stores of the sweep; one with a password is in their environment already."""
    addresses = {"tracking.uri": stores.tracking, "tracking.registry_uri": stores.registry}
    return [f"{key}={uri}" for key, uri in addresses.items() if shown(uri) == uri]


def parse_space(space: list[str]) -> dict[str, Any]:
    """Ray Tune's form of `key=log(low,high)`, `key=uniform(low,high)` and `key=choice(a,b,...)`.

    Raises:
        UserError: it is of no such form.
    """
    found: dict[str, Any] = {}
    for text in space:
        form = _FORM.fullmatch(text.replace(" ", ""))
        values = form["values"].split(",") if form else []
        try:
            if form is None or not values:
                raise ValueError
            if form["kind"] == "choice":
                found[form["key"]] = tune.choice(values)
            else:
                low, high = map(float, values)
                if not low < high or (form["kind"] == "log" and low <= 0):
                    raise ValueError
                found[form["key"]] = (tune.loguniform if form["kind"] == "log" else tune.uniform)(low, high)
        except ValueError:
            raise UserError(
                f"--space {text} is not of the form KEY=log(LOW,HIGH), KEY=uniform(LOW,HIGH) or KEY=choice(A,B,...), "
                f"with LOW below HIGH, and above 0 for log."
            ) from None
    if not found:
        raise UserError("give at least one --space, for example --space 'optim.lr=log(0.01,1)'.")
    return found


def _edges(searched: dict[str, Any]) -> list[list[str]]:
    """Overrides at the ends of the space, and for each choice."""
    edges: list[list[str]] = []
    for key, domain in searched.items():
        values = domain.categories if hasattr(domain, "categories") else (domain.lower, domain.upper)
        edges += [[f"{key}={value}"] for value in values]
    return edges


def trial(values: dict[str, Any], task: dict[str, Any]) -> None:
    """One trial: a training with these values, whose evaluations Ray Tune hears of."""
    os.chdir(task["cwd"])
    name = f"trial-{tune.get_context().get_trial_id()}"
    given = [f"{key}={value}" for key, value in values.items()]
    offered: Resources = task["offered"]
    prepared = prepare(read_config(Path(task["path"]), [*task["overrides"], *given, f"run.name={name}"]), offered)
    best: dict[float, float] = {}  # by epoch: of the weights and their average, the better one's accuracy

    with (
        claimed(prepared.run_dir, prepared.config),
        Tracker(prepared.config, prepared.run_dir, name, print, task["parent"]) as tracker,
    ):
        tracker.params(prepared.config.model_dump(mode="json"))
        recorder = Recorder(tracker, prepared.config, prepared.run_dir)
        last = "raw" if prepared.config.ema.decay is None else "ema"

        def on_event(event: dict[str, Any]) -> None:
            recorder.on_event(event)
            if event["kind"] != "eval":
                return
            top1, epoch = 100 * event["top1_correct"] / event["total"], event["epoch"]
            best[epoch] = max(top1, best.get(epoch, 0.0))
            if event["weights"] == last:
                tracker.flush(_FLUSH_S)  # the trial's process may be ended at once
                tune.report({"top1": best[epoch], "loss": event["loss"], "epoch": epoch, "evaluations": len(best)})

        run(prepared, on_event)


def _print(console: Console, path: Path, overrides: list[str], results: tune.ResultGrid) -> None:
    told = [r for r in results if r.metrics and "top1" in r.metrics]
    if not told:
        errors = [str(r.error).strip().splitlines()[-1] for r in results if r.error]
        raise TrainingError(f"no trial came to an evaluation: {errors[0] if errors else 'no error is known'}")
    told.sort(key=_top1, reverse=True)
    keys = sorted(told[0].config)
    columns = ("top-1 %", "epochs", *keys)
    rows = []
    for result in told:
        metrics = result.metrics or {}
        values = [_shown(result.config[key]) for key in keys]
        rows.append((f"{metrics['top1']:.2f}", f"{metrics['epoch']:.1f}", *values))
    print_table(console, columns, rows, right=columns)
    best = [f"{key}={told[0].config[key]}" for key in keys]
    again = [given for given in overrides if not given.startswith("run.name=")]
    console.print(
        f"the best again: densenet train {shlex.join([str(path), *again, *best])}", soft_wrap=True, markup=False
    )


def _top1(result: Any) -> float:
    return result.metrics["top1"]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
