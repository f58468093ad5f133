"""A fork server for the worker processes of a local Ray: they need not import their packages, which takes seconds.

Ray starts a process for each actor, with `forked_worker.py`. That script asks the fork server for a fork, which then
runs Ray's own worker program. The fork server is two processes: one has imported what Ray Train's own actors need, and
its child, in runs on CPUs, also what training workers need. Neither starts a thread or opens a CUDA context.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launch.cluster import forked_worker
from launch.cluster.allocation import Allocation
from pipeline.config import RunConfig
from pipeline.config_fields import Device

_OF_ACTORS = (
    "launch.cluster.event_channel",
    "launch.cluster.process_group",
    "launch.cluster.worker",
    "launch.cluster.worker_failures",
    "ray._private.workers.default_worker",
)
_OF_WORKERS = ("ray.train.torch", "pipeline.train.rank")
_ACTORS, _WORKERS = "actors", "workers"  # the sockets of the two processes
_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from launch.cluster.fork_server import main; main()"


@contextmanager
def fork_server(device: Device, log_file: Path) -> Iterator[None]:
    """Starts a fork server for the local Ray that starts in the context, and ends it at the end, but not its forks.

    It ends by itself if this process is killed. An environment variable tells its address.

    Args:
        device: The run's device: training workers are forked with their packages on CPUs only.
        log_file: Receives what it prints.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="densenet-"))
        log = stack.enter_context(log_file.open("ab"))
        with _listener(f"{folder}/{_ACTORS}") as actors, _listener(f"{folder}/{_WORKERS}") as workers:
            sockets = actors.fileno(), workers.fileno()
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, json.dumps(sys.path), *map(str, sockets), device],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=sockets,
                env=os.environ | {"RAY_JOB_ID": forked_worker.JOB_ID, "RAY_RAYLET_PID": f"{os.getpid()}"},
                cwd=log_file.parent,
                start_new_session=True,  # Ctrl-C must not reach it
            )
        outer = os.environ.get(forked_worker.SOCKET)
        os.environ[forked_worker.SOCKET] = f"{folder}/{_ACTORS}"
        try:
            yield
        finally:
            del os.environ[forked_worker.SOCKET]
            if outer is not None:
                os.environ[forked_worker.SOCKET] = outer
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _listener(path: str) -> socket.socket:
    """Returns a socket that takes requests at once; they wait for the imports."""
    listener = socket.socket(socket.AF_UNIX)
    with forked_worker.short_path(path) as short:
        listener.bind(short)
    listener.listen()
    return listener


def worker_env(config: RunConfig, allocation: Allocation) -> dict[str, str]:
    """Returns the environment variables of the runtime environment of training workers.

    Workers with variables of the user are not forked: libraries read some variables when they are loaded.
    """
    server = os.environ.get(forked_worker.SOCKET)
    if not allocation.embedded or server is None:
        return config.cluster.env
    if config.cluster.env:
        return config.cluster.env | {forked_worker.SOCKET: ""}
    return {forked_worker.SOCKET: str(Path(server).with_name(_WORKERS))} if allocation.device == "cpu" else {}


def main() -> None:
    """Runs the fork server, until its standard input is closed."""
    _, *sockets, device = sys.argv[1:]
    actors, workers = (socket.socket(fileno=int(number)) for number in sockets)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for the forks
    gc.disable()  # the imports take an eighth less time
    _give_own_ids()
    _import(_OF_ACTORS)
    if device == "cpu" and _fork() == 0:
        actors.close()
        _import(_OF_WORKERS)
        from pipeline.train.deepspeed_schema import import_deepspeed

        import_deepspeed(device)
        _serve(workers)
    else:
        workers.close()
        _serve(actors)


def _import(names: Iterable[str]) -> None:
    for name in names:
        importlib.import_module(name)


def _give_own_ids() -> None:
    """Makes Ray's classes of actors take their ids from the operating system.

    Ray's own generator would start in the fork server, and all forks would then generate the same ids, of objects too.
    """
    import ray.actor

    class ActorClassID(ray.actor.ActorClassID):
        @classmethod
        def from_random(cls) -> "ActorClassID":
            return cls(os.urandom(cls.size()))

    ray.actor.ActorClassID = ActorClassID


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of threads. Those here are of numpy and pyarrow, which start them again in the fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _serve(listener: socket.socket) -> None:
    """Forks for each request, until the standard input is closed."""
    gc.freeze()  # a collection in a fork would copy the memory that it shares
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        with connection:
            if _fork() == 0:
                listener.close()
                _become_worker(connection)
                return


def _become_worker(connection: socket.socket) -> None:
    """Takes over the standard streams, environment and command line of the process that sent the request."""
    import numpy as np
    import ray

    os.setpgid(0, 0)  # Ray ends the group of a worker with it
    descriptors = socket.recv_fds(connection, 1, 3)[1]
    with connection.makefile("rb") as stream:
        request = json.load(stream)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    np.random.seed()
    gc.enable()
    ray._raylet.Config.initialize("")  # reads RAY_AUTH_MODE again
    connection.sendall(forked_worker.FORKED)
    runpy.run_path(sys.argv[0], run_name="__main__")
