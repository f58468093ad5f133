"""Ray: an embedded or an existing cluster, and one training on it."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.autoscaler.sdk import request_resources
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from launch.hub import Losses, open_hub, pump
from launch.net import HOST, answers
from launch.prepare import Prepared
from launch.resources import NoRoom, Resources, share
from launch.worker import code_version, train_worker
from pipeline.config import Elastic, RunConfig
from pipeline.errors import TrainingError, UserError
from pipeline.train.checkpoint import checkpoint_root, newest_valid, samples_of
from pipeline.train.storage import StorageError, fetch

_CONNECT_S = 5
_WAIT_S = 2
_ABORT_S = 5
# Ray's limits for the answers of its own processes, seconds or ms: a machine so busy, or asleep, is slow and not lost.
_PATIENCE = {
    "gcs_rpc_server_reconnect_timeout_s": 1800,
    "gcs_server_request_timeout_seconds": 600,
    "worker_register_timeout_seconds": 600,
    "agent_register_timeout_ms": 600_000,
    "health_check_timeout_ms": 600_000,
}
_NO_CLUSTER = (
    "Start a cluster with `ray start --head`, correct the address, or unset RAY_ADDRESS to run on this machine."
)


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
            with _surroundings(log_file.parent):
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
        with _surroundings(log_file.parent):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                dashboard_host=HOST,
                dashboard_port=dashboard_port,
                log_to_driver=False,
                _system_config=_PATIENCE,
            )
        try:
            yield _dashboard()
        finally:
            ray.shutdown()


@contextmanager
def _surroundings(folder: Path) -> Iterator[None]:
    """What Ray's processes inherit of this one: `folder` to work in, and that they do not heed SIGHUP.

    Ray puts the driver's working folder in front of its workers' import path, where the user may have a `launch` of his
    own. A terminal that closes sends SIGHUP to all processes in it, and the driver alone is to answer it.
    """
    main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if main else None
    try:
        with chdir(folder):
            yield
    finally:
        if main:
            signal.signal(signal.SIGHUP, before)


def _dashboard() -> str:
    return f"http://{_node()['webui_url']}"


def _node() -> dict[str, str]:
    """What Ray tells of the node that this driver is on."""
    return ray.get_runtime_context().worker.node.address_info


def offered_by_cluster(address: str) -> Resources:
    """CPU cores, GPUs and further resources of the cluster that this process is connected to."""
    total = ray.cluster_resources()
    further = {name: amount for name, amount in total.items() if name not in ("CPU", "GPU")}
    where = f"the cluster at {address}"
    return Resources(where, int(total.get("CPU", 0)), int(total.get("GPU", 0)), embedded=False, further=further)


def wait_for_room(config: RunConfig, address: str, told: Callable[[str], None]) -> None:
    """Waits until the cluster has what the run needs, after asking its autoscaler for it; `told` gets the reason once.

    Raises:
        UserError: the run does not fit for a reason that more nodes do not change.
    """
    waits = False
    while True:
        try:
            share(config, offered_by_cluster(address))
            return
        except NoRoom as error:
            if not waits:
                told(f"waiting: {error}")
                request_resources(bundles=_bundles(config))
                waits = True
        time.sleep(_WAIT_S)


def _bundles(config: RunConfig) -> list[dict[str, float]]:
    """What each worker needs at least, for the autoscaler."""
    cluster = config.cluster
    workers = cluster.workers.min if isinstance(cluster.workers, Elastic) else cluster.workers
    cpus = 1 if cluster.cpus_per_worker == "auto" else cluster.cpus_per_worker
    gpus = {"GPU": 1.0} if config.device == "cuda" else {}
    return [{"CPU": cpus} | gpus | cluster.resources] * (1 if workers == "auto" else workers)


def run(prepared: Prepared, on_event: Callable[[dict[str, Any]], None]) -> None:
    """Trains on the connected cluster until the run is complete; `on_event` gets the events in order, in a thread.

    SIGTERM and SIGHUP ask the workers to end after a checkpoint; they tell so by the event `stopped`, which gets the
    signal's number as `signal`.

    Raises:
        UserError: a worker met an error that the user can mend, or another driver trains this run.
        TrainingError: the workers failed more often than `cluster.max_failures`, or there was no room for them for
            `cluster.replacement_timeout_s`.
    """
    config, share, run_dir = prepared.config, prepared.share, prepared.run_dir
    hub = open_hub(str(config.run.name))
    low, high = share.bounds
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config,
            "derived": prepared.derived,
            "sources": prepared.sources,
            "resume": prepared.resume,
            "run_dir": run_dir,
            "train_index": ray.put(prepared.train_index),
            "val_index": ray.put(prepared.val_index),
            "code": code_version(prepared.config.run.plugins),
            "hub": hub,
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
            callbacks=[Losses(hub)],
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

    def with_signal(event: dict[str, Any]) -> None:
        on_event(event | {"signal": asked[0]} if event["kind"] == "stopped" and asked else event)

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
            on_event({"kind": "warning", "message": f"after the last checkpoint Ray failed: {what.splitlines()[-1]}"})
            return
        raise TrainingError(
            f"{what}\nThe same command with run.name={config.run.name} goes on from the newest checkpoint. The "
            f"workers' own logs are in {run_dir / 'logs'}, Ray's in {os.path.realpath(_node()['session_dir'])}/logs."
        ) from failure


def _is_complete(prepared: Prepared) -> bool:
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
