"""Ray starts this script for each worker process of a local Ray, instead of its `setup_worker.py`.

It asks a fork server for the process and stays until the process ends. It starts Ray's script without a fork server,
and for a worker with another interpreter or a container. It imports little, because Ray waits for it.
"""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SOCKET = "DENSENET_FORK_SERVER"  # environment variable: path of the fork server's socket
JOB_ID = "01000000"  # of the only driver
FORKED = b"forked"  # the answer of the new process
_LANGUAGE, _CONTEXT = "--language=", "--serialized-runtime-env-context="


def main() -> None:
    """Makes the fork server fork a worker, and waits for its end; or else becomes the worker, by Ray's own script."""
    program, *options = sys.argv[1:]
    context = json.loads(next((o.removeprefix(_CONTEXT) for o in options if o.startswith(_CONTEXT)), "{}"))
    env = os.environ | context.get("env_vars", {})
    usual = context.get("py_executable", sys.executable) == sys.executable and not (
        context.get("command_prefix") or context.get("override_worker_entrypoint")
    )
    if usual and f"{_LANGUAGE}PYTHON" in options and env.get("RAY_JOB_ID") == JOB_ID and env.get(SOCKET):
        argv = [program, *(o for o in options if not o.startswith((_LANGUAGE, _CONTEXT)))]
        if _is_forked(env[SOCKET], {"argv": argv, "env": env, "cwd": os.getcwd()}):
            return
    os.execv(sys.executable, [sys.executable, f"{os.path.dirname(program)}/setup_worker.py", *sys.argv[1:]])


def _is_forked(path: str, request: dict) -> bool:
    """Returns True after the forked process has ended, or False if there is no fork server."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            with short_path(path) as short:
                connection.connect(short)
            socket.send_fds(connection, [b"0"], [0, 1, 2])
            connection.sendall(json.dumps(request).encode())
            connection.shutdown(socket.SHUT_WR)
            forked = connection.recv(len(FORKED)) == FORKED
            while forked and connection.recv(1):
                pass
        except OSError:
            return False
    return forked


@contextmanager
def short_path(path: str) -> Iterator[str]:
    """Yields another path of a file: the path of a Unix socket may have 107 bytes only."""
    folder = os.open(os.path.dirname(path), os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


if __name__ == "__main__":
    main()
