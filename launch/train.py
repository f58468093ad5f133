"""The driver of one training: prepare, track, run on Ray, register, sum up."""

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from rich.console import Console

from launch.cluster import cluster_address, embedded, joined, offered_by_cluster, run, wait_for_room
from launch.net import check_port, free_port
from launch.plan import print_plan
from launch.prepare import Prepared, check_secrets, check_writable, prepare, read_config
from launch.progress import WEIGHTS, Clock, Display, accuracy, speed
from launch.record import Recorder
from launch.resources import this_machine
from launch.worker import PROBE
from pipeline.config import RunConfig
from pipeline.derived import Derived
from pipeline.errors import UserError
from pipeline.export.package import Registered, register
from pipeline.tracking.plots import curve
from pipeline.tracking.run import Tracker, default_tracking_uri, shown, wait_for
from pipeline.train import checkpoint
from pipeline.train.schedule import learning_rate
from pipeline.train.state import best_checkpoint, checkpoint_root, fetch, read_state


class _Stopped(Exception):
    """The workers have ended early, as they were asked to."""


_PLOTTED = 1000
_PHASES = {"workers_started": "worker start", "first_step": "first step"}


def train_command(
    console: Console,
    path: Path,
    overrides: list[str],
    address: str | None,
    resume: str | None = None,
    wait: bool = False,
) -> None:
    """Trains as `densenet train` does, and prints the summary; with `wait` once the cluster has room.

    Raises:
        UserError: bad input; nothing is left running.
        TrainingError: the workers failed for another reason.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM and the checkpoint that follows it.
    """
    clock = Clock()
    default_uri = default_tracking_uri()  # asked for now: registering sets the variable that it reads
    check_secrets()
    config = read_config(path, overrides)
    check_writable(Path(config.run.output))
    address = cluster_address(address)
    log_file = Path(config.run.output) / str(config.run.name) / "logs" / "ray.log"
    with ExitStack() as stack:
        if address is None:
            dashboard_port = _dashboard_port(config)
            prepared = prepare(config, this_machine(), resume)
        else:
            dashboard = stack.enter_context(joined(address, log_file))
            if wait:
                wait_for_room(config, address, lambda text: console.print(text, style="yellow", soft_wrap=True))
            prepared = prepare(config, offered_by_cluster(address), resume)
        print_plan(console, prepared)
        stack.enter_context(_claimed(prepared))
        tracker = _start_tracker(prepared)
        clock.ended("prepare")
        try:
            with _display(console, prepared) as display:
                if address is None:
                    display.status("starting Ray")
                    cpus = max(prepared.derived.workers * prepared.derived.cpus_per_worker, this_machine().cpus)
                    dashboard = stack.enter_context(embedded(cpus, dashboard_port, log_file))
                    clock.ended("Ray start")
                display.status(f"starting {prepared.derived.workers} workers; Ray dashboard {dashboard}")
                img_per_s = _train(prepared, tracker, display, clock)
                clock.ended("training")
                if display.stopped_at is not None:
                    raise _Stopped
                display.status("registering the model")
                fetch(prepared.config, prepared.run_dir)
                best = best_checkpoint(prepared.run_dir)
                wait_for(tracker.uri, config.tracking.patience_s, display.warning)
                registered = _register(prepared, tracker, best)
                clock.ended("registration")
        except _Stopped:
            tracker.finish("KILLED")
            console.print(
                f"stopped by SIGTERM at {display.stopped_at:,} samples, after a checkpoint; the same command with "
                f"run.name={config.run.name} goes on",
                style="yellow",
                soft_wrap=True,
            )
            raise SystemExit(128 + signal.SIGTERM) from None
        except KeyboardInterrupt:
            tracker.finish("KILLED")
            console.print("interrupted: checkpoints and records so far are kept", style="yellow")
            raise SystemExit(130) from None
        except Exception:
            for log in sorted((prepared.run_dir / "logs").glob("*.log")):
                tracker.attach(log, "logs")
            tracker.finish("FAILED")
            raise
        unsent = tracker.finish("FINISHED", config.tracking.patience_s)
    uri = "" if tracker.uri == default_uri else f" --uri {shlex.quote(shown(tracker.uri))}"
    _print_summary(console, prepared, uri, best, registered, img_per_s, clock)
    if display.skipped:
        console.print(
            f"warning: {len(display.skipped)} damaged training pictures were replaced by others; they are named in "
            f"{prepared.run_dir / 'logs'}",
            style="yellow",
            soft_wrap=True,
        )
    if unsent:
        console.print(f"warning: {unsent} records did not reach {shown(tracker.uri)}; they are in {prepared.run_dir}")


@contextmanager
def _claimed(prepared: Prepared) -> Iterator[None]:
    """Keeps other drivers from the run's folder, and leaves the config there, by which nodes know the folder.

    Raises:
        UserError: another driver has it.
    """
    run_dir = prepared.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_dir / "driver.lock", timeout=0):
            temporary = run_dir / f"{PROBE}.tmp"
            temporary.write_text(prepared.config.to_yaml(), encoding="utf-8")
            temporary.replace(run_dir / PROBE)
            yield
    except Timeout as error:
        raise UserError(
            f"run.name={prepared.config.run.name} is being trained by another process in {run_dir}: wait for its end, "
            f"or choose another run.name."
        ) from error


def _dashboard_port(config: RunConfig) -> int:
    port = config.cluster.dashboard_port
    if port == "auto":
        return free_port()
    check_port(port, "cluster.dashboard_port")
    return port


def _start_tracker(prepared: Prepared) -> Tracker:
    """Starts the MLflow run, or goes on with the one that this run's folder remembers."""
    config, run_dir = prepared.config, prepared.run_dir
    record = run_dir / "mlflow_run.json"
    run_id = json.loads(record.read_text(encoding="utf-8"))["run_id"] if record.is_file() else None
    derived = {f"derived.{key}": value for key, value in prepared.derived.model_dump().items()}
    tracker = Tracker.start(
        config,
        run_dir=run_dir,
        run_name=str(config.run.name),
        params=derived,
        tags={
            "data.train.fingerprint": prepared.train_index.fingerprint,
            "data.val.fingerprint": prepared.val_index.fingerprint,
            "eval.transform": config.eval.description,
        },
        figures={"learning_rate.png": _learning_rates(config, prepared.derived)},
        run_id=run_id,
    )
    checkpoint.write_json(record, {"run_id": tracker.run_id})
    return tracker


def _learning_rates(config: RunConfig, derived: Derived) -> Figure:
    """The learning rate over the run, at up to `_PLOTTED` of its steps."""
    stride = max(1, derived.total_steps // _PLOTTED)
    samples = [step * derived.global_batch_size for step in range(0, derived.total_steps, stride)]
    rates = [learning_rate(config.schedule, derived, seen) for seen in samples]
    return curve([seen / derived.train_samples for seen in samples], rates, "epoch", "learning rate")


def _display(console: Console, prepared: Prepared) -> Display:
    derived = prepared.derived
    return Display(console, prepared.config.train.epochs, derived.total_steps, derived.workers)


def _train(prepared: Prepared, tracker: Tracker, display: Display, clock: Clock) -> float | None:
    """Trains on the connected cluster; returns the mean speed in images/s, or None when nothing was left to train."""
    img_per_s: float | None = None
    recorder = Recorder(tracker)

    def on_event(event: dict[str, Any]) -> None:
        nonlocal img_per_s
        recorder.on_event(event)
        phase = _PHASES.get(event["kind"])
        if phase is not None and phase not in clock.phases:
            clock.ended(phase, at=event["time"])
        if event["kind"] == "trained":
            img_per_s = event["img_per_s"]
        display.on_event(event)

    run(prepared, on_event)
    return img_per_s


def _register(prepared: Prepared, tracker: Tracker, best: Path) -> Registered:
    """Registers the best checkpoint, unless an earlier start of this run has done so."""
    config, record = prepared.config, prepared.run_dir / "registered.json"
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["checkpoint"] == best.name:
            return Registered(**known["model"])
    registered = register(
        best,
        uri=tracker.uri,
        run_id=tracker.run_id,
        name=config.tracking.register_as or config.model.name,
        alias=config.tracking.alias,
        data_fingerprint=prepared.train_index.fingerprint,
    )
    checkpoint.write_json(record, {"checkpoint": best.name, "model": asdict(registered)})
    return registered


def _print_summary(
    console: Console,
    prepared: Prepared,
    uri: str,
    best: Path,
    registered: Registered,
    img_per_s: float | None,
    clock: Clock,
) -> None:
    """The run in a few lines: results, where things are, and the two commands that come next."""
    newest = checkpoint.checkpoints(checkpoint_root(prepared.run_dir))[-1]
    state = read_state(newest)
    program = shlex.quote(sys.argv[0]) if shutil.which("densenet") is None else "densenet"
    picture = "IMAGE"
    if not prepared.val_index.in_shards:
        file = prepared.val_index.path(0)
        picture = shlex.quote(min(str(file), os.path.relpath(file), key=len))
    lines = [
        (
            when,
            f"{accuracy(state[when])}, {WEIGHTS[state[f'{when}_of']]}at {state[f'{when}_at']:,} samples",
        )
        for when in ("best", "last")
    ]
    lines += [
        ("evaluated as", prepared.config.eval.description),
        ("speed", "nothing was left to train" if img_per_s is None else f"{speed(img_per_s)} in training"),
        ("time", str(clock)),
        ("checkpoint", str(best)),
        ("model", f"{registered.name} version {registered.version}, alias {registered.alias} ({registered.uri})"),
        ("MLflow UI", f"{program} ui{uri}"),
        ("predict", f"{program} predict {registered.uri} {picture}{uri}"),
    ]
    console.rule("done")
    for name, text in lines:
        console.print(f"{name:13}{text}", markup=False, soft_wrap=True)
