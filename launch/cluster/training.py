"""One training on the cluster that this process is connected to."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from launch.cluster.connect import ray_logs
from launch.cluster.event_channel import WorkerFailureCallback, open_event_channel, pump
from launch.cluster.prepared_run import PreparedRun
from launch.cluster.worker import Task, code_version, train_worker
from pipeline.errors import TrainingError, UserError
from pipeline.train.checkpoint import checkpoint_root, newest_valid, samples_of
from pipeline.train.events import Event, Report, Stopped, Warned
from pipeline.train.storage import StorageError, fetch

_ABORT_S = 5


def run(prepared: PreparedRun, on_event: Report) -> None:
    """Trains on the connected cluster until the run is complete; `on_event` gets the events in order, in a thread.

    SIGTERM and SIGHUP ask the workers to end after a checkpoint; they tell so by the event `Stopped`, which gets the
    signal's number.

    Raises:
        UserError: a worker met an error that the user can fix, or another driver trains this run.
        TrainingError: the workers failed more often than `cluster.max_failures`, or there was no room for them for
            `cluster.replacement_timeout_s`.
    """
    config, share, run_dir = prepared.config, prepared.allocation, prepared.run_dir
    hub = open_event_channel(str(config.run.name))
    low, high = share.bounds
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "task": Task(
                config=config,
                derived=prepared.derived,
                sources=prepared.sources,
                resume=prepared.resume,
                run_dir=run_dir,
                train_index=ray.put(prepared.train_index),
                val_index=ray.put(prepared.val_index),
                code=code_version(config.run.plugins),
                hub=hub,
            )
        },
        scaling_config=ScalingConfig(
            num_workers=high if low == high else (low, high),
            use_gpu=share.device == "cuda",
            resources_per_worker={"CPU": share.cpus_per_worker, "GPU": share.gpus_per_worker}
            | config.cluster.resources,
            placement_strategy=config.cluster.placement.upper(),
            accelerator_type=config.cluster.accelerator_type,
            elastic_resize_monitor_interval_s=config.cluster.resize_interval_s,
        ),
        torch_config=TorchConfig(backend="nccl" if share.device == "cuda" else "gloo"),
        # Ray's own restore is not used (a fresh name each time): workers find the newest valid checkpoint themselves.
        run_config=ray.train.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            worker_runtime_env={"env_vars": config.cluster.env},
            callbacks=[WorkerFailureCallback(hub)],
        ),
    )
    done, late = threading.Event(), threading.Event()

    def give_up() -> None:
        """Ends `fit` as Ctrl-C does: Ray's controller, which may be deep in waiting, at once with the third one."""
        late.set()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            if done.wait(_ABORT_S):
                return

    asked: list[int] = []

    def ask_to_stop(number: int, frame: object) -> None:
        asked.append(number)
        hub.ask_to_stop.remote()

    def with_signal(event: Event) -> None:
        on_event(replace(event, signal=asked[0]) if isinstance(event, Stopped) and asked else event)

    arguments = (hub, with_signal, done, config.cluster.replacement_timeout_s, give_up)
    thread = threading.Thread(target=pump, args=arguments, daemon=True)
    thread.start()
    failure: Exception | None = None
    try:
        with _answered_by(ask_to_stop):
            trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        failure = error
    except (SystemExit, KeyboardInterrupt):  # Ray's own handling of Ctrl-C, after it has ended the workers
        if not late.is_set():
            raise KeyboardInterrupt from None
        failure = TimeoutError(
            f"there was no room for {low} workers for {config.cluster.replacement_timeout_s:g} s "
            f"(cluster.replacement_timeout_s)."
        )
    finally:
        done.set()
        thread.join()
    message = _error(hub)
    if message is not None:
        raise UserError(message)
    if failure is not None:
        what = str(failure)
        if isinstance(failure, ray.exceptions.RayError):  # its text is about actors and objects alone
            what = "Ray lost the node that the driver is on, or its own processes there."
        if _is_complete(prepared):
            on_event(Warned(f"after the last checkpoint Ray failed: {what.splitlines()[-1]}"))
            return
        raise TrainingError(
            f"{what}\nThe same command with run.name={config.run.name} goes on from the newest checkpoint. The "
            f"workers' own logs are in {run_dir / 'logs'}, Ray's in {ray_logs()}."
        ) from failure


def _is_complete(prepared: PreparedRun) -> bool:
    """Whether the checkpoint at the end of the run is there: what fails afterwards has cost nothing."""
    with suppress(StorageError):
        fetch(prepared.config, prepared.run_dir)
    newest = newest_valid(checkpoint_root(prepared.run_dir), lambda skipped: None)
    return newest is not None and samples_of(newest) >= prepared.derived.total_samples


@contextmanager
def _answered_by(ask_to_stop: Callable[[int, Any], None]) -> Iterator[None]:
    """Handles the signals that ask a run to end; SIGHUP not where it is ignored, as under `nohup`."""
    if threading.current_thread() is not threading.main_thread():  # a trial of a sweep
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask_to_stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _error(hub: Any) -> str | None:
    """The first error that a worker has told the hub; None too when the hub has gone with its node."""
    try:
        return ray.get(hub.error.remote())
    except ray.exceptions.RayError:
        return None
