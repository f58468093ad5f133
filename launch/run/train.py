"""The driver of a training run: prepares, tracks, trains on Ray, registers the model, prints the summary."""

import os
import shlex
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.cluster.allocation import machine_resources
from launch.cluster.fork_server import fork_server
from launch.cluster.job_env import check_secrets
from launch.cluster.ports import check_port, cluster_address, free_port
from launch.cluster.prepared_run import PreparedRun
from launch.cluster.signals import signal_handler
from launch.run.exit_notice import exit_notice
from launch.run.phase_timer import PhaseTimer
from launch.run.plan import print_plan, print_warnings
from launch.run.prepare import prepare, read_config
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.evaluation.counts import EvalResult, format_accuracy
from pipeline.formatting import speed
from pipeline.tracking.stores import Stores, redacted
from pipeline.train import checkpoint
from pipeline.train.checkpoint import checkpoint_root, read_state
from pipeline.train.disk_space import check_disk_space
from pipeline.train.events import Event, FirstStep, Trained, WorkersStarted
from pipeline.train.progress import WEIGHTS, Display
from pipeline.train.run_lock import run_lock
from pipeline.train.setup import check_writable

if TYPE_CHECKING:
    from pipeline.export.package import RegisteredModel
    from pipeline.export.tracked import TrackedRun
    from pipeline.tracking.run import Tracker

_PHASES = {WorkersStarted: "worker start", FirstStep: "first step"}


def train_command(
    console: Console,
    path: Path,
    overrides: list[str],
    address: str | None,
    resume: str | None = None,
    wait: bool = False,
    quiet: bool = False,
) -> None:
    """Runs `densenet train`, and prints the summary.

    With `wait` it waits until the cluster has the resources; with `quiet` it prints only warnings and the summary.

    Raises:
        UserError: Bad input; nothing is left running.
        TrainingError: The workers failed for another reason.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. In training the two last write a checkpoint.
    """
    try:
        with signal_handler(_raise_signal):
            _train_command(console, path, overrides, address, resume, wait, quiet)
    except (KeyboardInterrupt, _Terminated) as end:
        number = end.number if isinstance(end, _Terminated) else signal.SIGINT
        console.print(f"ended by {number.name}: the checkpoints and records so far are saved", style="yellow")
        raise SystemExit(128 + number) from None


class _Terminated(BaseException):
    """A signal before or after training; like `KeyboardInterrupt` no handler of errors catches it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.number = number


def _raise_signal(number: int, frame: object) -> None:
    raise _Terminated(signal.Signals(number))


def _train_command(
    console: Console,
    path: Path,
    overrides: list[str],
    address: str | None,
    resume: str | None,
    wait: bool,
    quiet: bool,
) -> None:
    timer = PhaseTimer()
    check_secrets()
    config = read_config(path, overrides)
    check_writable(Path(config.run.output))
    address = cluster_address(address)
    if wait and address is None:
        raise UserError("--wait waits for resources of a cluster: set --address, or omit --wait.")
    log_file = Path(config.run.output) / str(config.run.name) / "logs" / "ray.log"
    notice = (
        f"training failed: the driver was killed, or Ray's core ended it. The same command with "
        f"run.name={config.run.name} resumes from the latest checkpoint."
    )
    with ExitStack() as stack:
        # The outermost context: Ray's core may also end the driver while it shuts down.
        stack.enter_context(exit_notice(notice))
        if address is None:
            dashboard_port = _dashboard_port(config)
            prepared = prepare(config, machine_resources(), resume)
        else:
            from launch.cluster.connect import (  # Ray takes seconds to import
                cluster_resources,
                connected_ray,
                wait_for_resources,
            )

            dashboard: str | None = stack.enter_context(connected_ray(address, log_file))
            if wait:
                wait_for_resources(config, address, lambda text: console.print(text, style="yellow", soft_wrap=True))
            prepared = prepare(config, cluster_resources(address), resume)
        config, run_dir = prepared.config, prepared.run_dir
        if not quiet:
            print_plan(console, prepared)
        print_warnings(console, prepared)
        check_disk_space(prepared)
        stack.enter_context(run_lock(run_dir, config))
        if address is None:
            stack.enter_context(fork_server(prepared.allocation.device, log_file))
            from launch.cluster.local_ray import starting_ray  # Ray takes half a second to import

            cpus = max(prepared.allocation.total_cpus, machine_resources().cpus)
            connect = stack.enter_context(starting_ray(cpus, log_file, dashboard_port))
        from pipeline.export.tracked import tracked  # MLflow takes seconds to import, while Ray starts

        display = _display(console, prepared, quiet)
        run = stack.enter_context(tracked(prepared, display.warning))
        tracker = run.tracker
        timer.end_phase("prepare")
        with display:
            if address is None:
                display.status("starting Ray")
                dashboard = connect()
                timer.end_phase("Ray start")
            where = f"; Ray dashboard {dashboard}" if dashboard is not None else ""
            display.status(f"starting {prepared.derived.workers} workers{where}")
            try:
                img_per_s = _train(prepared, run, display, timer)
            except Exception:  # raised again; the logs help to find the cause of any error
                run.attach_logs()
                raise
            timer.end_phase("training")
            run.attach_curves()
            if display.stopped_at is None:
                display.status("registering the model")
                best, registered = run.register()
                timer.end_phase("registration")
        if display.stopped_at is not None:
            console.print(
                f"stopped by {display.stopped_by.name} at {display.stopped_at:,} samples, after a checkpoint; the same "
                f"command with run.name={config.run.name} resumes",
                style="yellow",
                soft_wrap=True,
            )
            raise SystemExit(128 + display.stopped_by)
        results, commands = _summary(prepared, tracker.stores, best, registered, img_per_s, timer)
        tracker.set_tags({"mlflow.note.content": "\n".join(f"- **{name}**: {text}" for name, text in results)})
    _print_end(console, run_dir, results + commands, tracker, display)


def _dashboard_port(config: RunConfig) -> int | None:
    port = config.cluster.dashboard_port
    if port == "auto":
        return free_port()
    if port is not None:
        check_port(port, "cluster.dashboard_port")
    return port


def _display(console: Console, prepared: PreparedRun, quiet: bool) -> Display:
    derived = prepared.derived
    return Display(console, prepared.config.train.epochs, derived.total_steps, derived.workers, quiet)


def _train(prepared: PreparedRun, tracked_run: "TrackedRun", display: Display, timer: PhaseTimer) -> float | None:
    """Trains on the connected cluster; returns the mean images/s, or None if the run was complete already."""
    img_per_s: float | None = None

    def on_event(event: Event) -> None:
        nonlocal img_per_s
        phase = _PHASES.get(type(event))
        if phase is not None and phase not in timer.phases:
            timer.end_phase(phase)
        if isinstance(event, Trained):
            img_per_s = event.img_per_s
        display.on_event(event)
        tracked_run.on_event(event)

    from launch.cluster.training import run_training

    run_training(prepared, on_event)
    return img_per_s


def _print_end(
    console: Console, run_dir: Path, lines: list[tuple[str, str]], tracker: "Tracker", display: Display
) -> None:
    """Prints the summary, and warnings of skipped images and unsent records."""
    console.rule("done")
    for name, text in lines:
        console.print(f"{name:13}{text}", markup=False, soft_wrap=True)
    if display.skipped:
        console.print(
            f"warning: {len(display.skipped)} corrupt training images were replaced by others; their names are in "
            f"{run_dir / 'logs'}",
            style="yellow",
            soft_wrap=True,
        )
    if tracker.unsent:
        console.print(
            f"warning: {tracker.unsent} records did not reach {redacted(tracker.uri)}; they are in "
            f"{tracker.journal.file}, and `densenet runs sync {run_dir}` sends them",
            style="yellow",
            soft_wrap=True,
        )


def _summary(
    prepared: PreparedRun,
    stores: Stores,
    best: Path,
    registered: "RegisteredModel | None",
    img_per_s: float | None,
    timer: PhaseTimer,
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Returns the summary as named lines: results and locations, then the next commands."""
    latest = checkpoint.checkpoints(checkpoint_root(prepared.run_dir))[-1]
    state = read_state(latest)
    program = shlex.quote(sys.argv[0]) if shutil.which("densenet") is None else "densenet"
    image = "IMAGE"
    if not prepared.val_index.in_shards:
        file = prepared.val_index.path(0)
        image = shlex.quote(min(str(file), os.path.relpath(file), key=len))
    results = []
    for key in ("best", "last"):
        accuracy, weights = format_accuracy(EvalResult(**state[key])), WEIGHTS[state[f"{key}_of"]]
        results.append((key, f"{accuracy}, {weights}at {state[f'{key}_at']:,} samples"))
    results += [
        ("evaluated as", prepared.config.eval.description),
        ("speed", "nothing was left to train" if img_per_s is None else f"{speed(img_per_s)} in training"),
        ("time", str(timer)),
        ("checkpoint", str(best)),
    ]
    commands = [("MLflow UI", f"{program} ui{stores.options()}")]
    if registered is None:
        return [*results, ("model", "not registered")], commands
    registry = f" in {redacted(stores.registry)}" if stores.separate_registry else ""
    about = f"{registered.name} version {registered.version}, alias {registered.alias} ({registered.uri}){registry}"
    results += [("model", about)]
    commands += [
        ("predict", f"{program} predict {shlex.quote(registered.uri)} {image}{stores.options()}"),
    ]
    return results, commands
