"""Ray: an embedded or an existing cluster, and one training on it."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from launch.net import HOST, answers
from launch.resources import Resources, Share
from launch.worker import train_worker
from pipeline.config import RunConfig
from pipeline.data.index import DatasetIndex
from pipeline.derived import Derived
from pipeline.errors import TrainingError, UserError
from pipeline.model.weights import Sources

_POLL_S = 0.2
_CONNECT_S = 5
_NO_CLUSTER = (
    "Start a cluster with `ray start --head`, correct the address, or unset RAY_ADDRESS to run on this machine."
)


@ray.remote(num_cpus=0)
class Hub:
    """Carries events from rank 0 to the driver, and remembers the first error."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._error: str | None = None
        self._stop = False

    def push(self, event: dict[str, Any]) -> None:
        self._events.append(event | {"time": time.time()})
        if event["kind"] == "error" and self._error is None:
            self._error = event["message"]

    def drain(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events

    def error(self) -> str | None:
        return self._error

    def ask_to_stop(self) -> None:
        self._stop = True

    def stop_asked(self) -> bool:
        return self._stop


def cluster_address(option: str | None) -> str | None:
    """The address of the cluster to join: the option, else RAY_ADDRESS (set inside a Ray job), else None."""
    return option or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def joined(address: str, log_file: Path) -> Iterator[str]:
    """Connects to the cluster at `address`, and leaves it at the end; yields the dashboard's address.

    Raises:
        UserError: no cluster answers there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit() and not answers(host, int(port), _CONNECT_S):
        # Ray itself would go on trying for minutes.
        raise UserError(f"nothing answers at the Ray address {address}. {_NO_CLUSTER}")
    with _ray_logs_to(log_file):
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address}: {str(error).splitlines()[0]} {_NO_CLUSTER}") from error
        try:
            yield _dashboard()
        finally:
            ray.shutdown()


@contextmanager
def embedded(num_cpus: int, dashboard_port: int, log_file: Path) -> Iterator[str]:
    """Starts a Ray of this run's own on loopback, and stops it at the end; yields the dashboard's address.

    Another cluster on the machine is neither joined nor touched.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _ray_logs_to(log_file):
        ray.init(
            address="local",
            num_cpus=num_cpus,
            dashboard_host=HOST,
            dashboard_port=dashboard_port,
            log_to_driver=False,
        )
        try:
            yield _dashboard()
        finally:
            ray.shutdown()


def _dashboard() -> str:
    return f"http://{_node()['webui_url']}"


def _node() -> dict[str, str]:
    """What Ray tells of the node that this driver is on."""
    return ray.get_runtime_context().worker.node.address_info


def offered_by_cluster(address: str) -> Resources:
    """CPU cores and GPUs of the cluster that this process is connected to."""
    total = ray.cluster_resources()
    return Resources(f"the cluster at {address}", int(total.get("CPU", 0)), int(total.get("GPU", 0)), embedded=False)


def run(
    config: RunConfig,
    derived: Derived,
    share: Share,
    train_index: DatasetIndex,
    val_index: DatasetIndex,
    sources: Sources,
    resume: Path | None,
    run_dir: Path,
    on_event: Callable[[dict[str, Any]], None],
) -> None:
    """Trains on the connected cluster until the run is complete; `on_event` gets the events in order, in a thread.

    SIGTERM asks the workers to end after a checkpoint; they tell so by the event `stopped`.

    Raises:
        UserError: a worker met an error that the user can mend.
        TrainingError: the workers failed more often than `cluster.max_failures`.
    """
    hub = Hub.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config,
            "derived": derived,
            "train_index": ray.put(train_index),
            "val_index": ray.put(val_index),
            "sources": sources,
            "resume": resume,
            "run_dir": run_dir,
            "hub": hub,
        },
        scaling_config=ScalingConfig(
            num_workers=derived.workers,
            use_gpu=share.device == "cuda",
            resources_per_worker={"CPU": share.cpus_per_worker, "GPU": share.gpus_per_worker},
        ),
        torch_config=TorchConfig(backend="nccl" if share.device == "cuda" else "gloo"),
        # Ray's own restore is not used (a fresh name each time): workers find the newest valid checkpoint themselves.
        run_config=ray.train.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    done = threading.Event()
    pump = threading.Thread(target=_pump, args=(hub, on_event, done), daemon=True)
    pump.start()
    failure: Exception | None = None
    before = signal.signal(signal.SIGTERM, lambda number, frame: hub.ask_to_stop.remote())
    try:
        trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        failure = error
    except SystemExit:  # Ray's own handling of Ctrl-C, after it has ended the workers
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)
        done.set()
        pump.join()
    message = _error(hub)
    if message is not None:
        raise UserError(message)
    if failure is not None:
        what = str(failure)
        if isinstance(failure, ray.exceptions.RayError):  # its text is about actors and objects alone
            what = "Ray lost the node that the driver is on, or its own processes there."
        raise TrainingError(
            f"{what}\nThe same command with run.name={config.run.name} goes on from the newest checkpoint. The "
            f"workers' own logs are in {run_dir / 'logs'}, Ray's in {_node()['session_dir']}/logs."
        ) from failure


def _error(hub: Any) -> str | None:
    """The first error that a worker has told the hub; None too when the hub has gone with its node."""
    try:
        return ray.get(hub.error.remote())
    except ray.exceptions.RayError:
        return None


def _pump(hub: Any, on_event: Callable[[dict[str, Any]], None], done: threading.Event) -> None:
    """Passes the hub's events on until `done` is set and the hub is empty, or has gone with its node."""
    while True:
        finished = done.wait(_POLL_S)
        try:
            events = ray.get(hub.drain.remote())
        except ray.exceptions.RayError:
            return
        for event in events:
            on_event(event)
        if finished:
            return


@contextmanager
def _ray_logs_to(file: Path) -> Iterator[None]:
    """Sends Ray's log, and what it prints in this process, to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("ray")
    kept, propagate = logger.handlers[:], logger.propagate
    with file.open("a", encoding="utf-8", buffering=1) as stream:
        logger.handlers, logger.propagate = [logging.StreamHandler(stream)], False
        try:
            with redirect_stdout(stream), redirect_stderr(stream):
                yield
        finally:
            logger.handlers, logger.propagate = kept, propagate
