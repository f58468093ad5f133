"""Runs a training on the connected Ray cluster."""

import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from launch.cluster.connect import ray_log_folder
from launch.cluster.event_channel import forward_events, open_event_channel
from launch.cluster.fork_server import worker_env
from launch.cluster.metrics import RunMetrics
from launch.cluster.prepared_run import PreparedRun
from launch.cluster.process_group import ProcessGroupConfig
from launch.cluster.signals import signal_handler
from launch.cluster.trainer import LocalTrainer
from launch.cluster.worker import Task, code_version, train_worker
from launch.cluster.worker_failures import WorkerFailureCallback
from pipeline.errors import TrainingError, UserError
from pipeline.train.checkpoint import checkpoint_root, latest_valid, samples_of
from pipeline.train.events import Event, Report, Stopped, Warned
from pipeline.train.storage import StorageError, fetch_checkpoints

_ABORT_S = 5  # between two SIGINTs


def run_training(prepared: PreparedRun, on_event: Report) -> None:
    """Trains on the connected cluster until the run is complete; `on_event` gets the events in order, in a thread.

    On SIGTERM or SIGHUP the workers end after a checkpoint; the event `Stopped` then has the signal's number.

    Raises:
        UserError: A worker met an error that the user can fix, or another driver trains this run.
        TrainingError: The workers failed more often than `cluster.max_failures`, or their resources were missing for
            `cluster.replacement_timeout_s`.
    """
    config, allocation, run_dir = prepared.config, prepared.allocation, prepared.run_dir
    channel = open_event_channel(str(config.run.name))
    low, high = allocation.bounds
    trainer_class = LocalTrainer if allocation.embedded else DataParallelTrainer
    trainer = trainer_class(
        train_worker,
        train_loop_config={
            "task": Task(
                config=config,
                derived=prepared.derived,
                sources=prepared.pretrained,
                resume=prepared.resume,
                run_dir=run_dir,
                train_index=ray.put(prepared.train_index),
                val_index=ray.put(prepared.val_index),
                code=code_version(config.run.plugins),
                channel=channel,
                preemptible=not allocation.embedded,
            )
        },
        scaling_config=ScalingConfig(
            num_workers=high if low == high else (low, high),
            use_gpu=allocation.device == "cuda",
            resources_per_worker={"CPU": allocation.cpus_per_worker, "GPU": allocation.gpus_per_worker}
            | config.cluster.resources,
            placement_strategy=config.cluster.placement.upper(),
            accelerator_type=config.cluster.accelerator_type,
            elastic_resize_monitor_interval_s=config.cluster.resize_interval_s,
        ),
        backend_config=ProcessGroupConfig("nccl" if allocation.device == "cuda" else "gloo"),
        # A new name each time, which disables Ray's own restore: workers find the latest valid checkpoint themselves.
        run_config=ray.train.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            worker_runtime_env={"env_vars": worker_env(config, allocation)},
            callbacks=[WorkerFailureCallback(channel)],
        ),
    )
    done, timed_out = threading.Event(), threading.Event()

    def abort() -> None:
        """Ends `fit` as Ctrl-C does; the third SIGINT ends Ray's controller at once, even while it waits."""
        timed_out.set()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            if done.wait(_ABORT_S):
                return

    signals: list[int] = []

    def request_stop(number: int, frame: object) -> None:
        signals.append(number)
        channel.request_stop.remote()

    metrics = RunMetrics(str(config.run.name), prepared.derived.total_samples)

    def on_any_event(event: Event) -> None:
        metrics.on_event(event)
        on_event(replace(event, signal=signals[0]) if isinstance(event, Stopped) and signals else event)

    arguments = (channel, on_any_event, done, config.cluster.replacement_timeout_s, abort)
    thread = threading.Thread(target=forward_events, args=arguments, daemon=True)
    metrics.start()
    thread.start()
    failure: Exception | None = None
    try:
        with signal_handler(request_stop):
            trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        failure = error
    except (SystemExit, KeyboardInterrupt):  # how Ray handles Ctrl-C, after it has ended the workers
        if not timed_out.is_set():
            raise KeyboardInterrupt from None
        failure = TimeoutError(
            f"the cluster had no resources for {low} workers for {config.cluster.replacement_timeout_s:g} s "
            f"(cluster.replacement_timeout_s)."
        )
    finally:
        done.set()
        thread.join()
        metrics.stop()
    message = _worker_error(channel)
    if message is not None:
        raise UserError(message)
    if failure is not None:
        cause = str(failure)
        if isinstance(failure, ray.exceptions.RayError):  # whose text names only actors and objects
            cause = "Ray lost the node that the driver is on, or its own processes there."
        if _is_complete(prepared):
            on_event(Warned(f"after the last checkpoint Ray failed: {cause.splitlines()[-1]}"))
            return
        raise TrainingError(
            f"{cause}\nThe same command with run.name={config.run.name} resumes from the latest checkpoint. The "
            f"workers' logs are in {run_dir / 'logs'}, Ray's in {ray_log_folder()}."
        ) from failure


def _is_complete(prepared: PreparedRun) -> bool:
    """Returns whether the run's last checkpoint exists: a later failure loses nothing."""
    with suppress(StorageError):
        fetch_checkpoints(prepared.config, prepared.run_dir)
    latest = latest_valid(checkpoint_root(prepared.run_dir), lambda skipped: None)
    return latest is not None and samples_of(latest) >= prepared.derived.total_samples


def _worker_error(channel: Any) -> str | None:
    """Returns the first error that a worker reported, or None; None too if the channel was lost with its node."""
    try:
        return ray.get(channel.error.remote())
    except ray.exceptions.RayError:
        return None
