"""A real Slurm on loopback: a controller, and two nodes, each a `slurmd`, on one machine."""

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from launch.cluster.ports import free_port
from tests.conftest import BIN, PROJECT
from tests.launch.conftest import wait_until

NODES = ("node1", "node2")
CPUS = 2  # of each node, however many the machine has
START_S = 60
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
SlurmdTimeout=30
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=90
MinJobAge=3600
FirstJobId={first_job}
SchedulerParameters=sched_interval=2,requeue_delay=1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A running Slurm; `env` lets its commands find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.env = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path, "PYTHONPATH": str(PROJECT)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts the daemons; returns when both nodes are idle."""
        self._configure()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()]
        self._start("munged", "--foreground", "--force", *options)
        wait_until((self.folder / "munge.socket").exists, self.logs, START_S)
        self._start("slurmctld", "-D", "-i")
        for name in NODES:
            self.start_node(name)
        wait_until(lambda: set(self.states().values()) == {"idle"}, self.logs, START_S)

    def start_node(self, name: str) -> None:
        """Starts the `slurmd` of a node."""
        self._start("slurmd", "-D", "-N", name, name=name)

    def kill_node(self, name: str) -> None:
        """Kills all processes of a node at once, as a power failure does."""
        self._kill([psutil.Process(self._daemons[name].pid)])
        tasks = [process for process in self._processes() if self._environ(process).get("SLURMD_NODENAME") == name]
        steps = [parent for task in tasks if (parent := task.parent()) and parent.name() == "slurmstepd"]
        self._kill([*steps, *tasks])
        self._daemons[name].wait()

    def run(self, *command: str | Path, **env: str) -> str:
        """Returns the output of a Slurm command."""
        done = subprocess.run(command, env=self.env | env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """Returns the state of each node, or nothing while the controller does not answer."""
        command = ["sinfo", "-N", "-h", "-o", "%N %T"]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        return dict(line.split() for line in done.stdout.splitlines())

    def logs(self) -> str:
        """Returns the logs of the daemons."""
        return "\n".join(f"{file}:\n{file.read_text()}" for file in sorted(self.folder.glob("*.log")))

    def end_jobs(self) -> None:
        """Kills the jobs of a failed test, and waits until they have ended."""
        for job in self.run("squeue", "-h", "-o", "%A").split():
            self.run("scancel", job)
        tasks = [process for process in self._processes() if "SLURM_JOB_ID" in self._environ(process)]
        self._kill([task for task in tasks if task.name() != "slurmstepd"])
        wait_until(lambda: not self.run("squeue", "-h"), self.logs)

    def close(self) -> None:
        """Kills the daemons, the jobs and their processes."""
        self._kill(self._processes())
        for daemon in self._daemons.values():
            daemon.wait()

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        text = _CONFIG.format(folder=self.folder, host=host, port=free_port(), first_job=free_port())
        for name in NODES:
            text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={CPUS}\n"
            (self.folder / f"spool-{name}").mkdir()
        (self.folder / "slurm.conf").write_text(text)
        version = re.search(r"(\d+)\.(\d+)", self.run("slurmd", "-V"))
        assert version is not None
        old = (int(version[1]), int(version[2])) < (23, 11)  # without CgroupPlugin=disabled
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}\n")

    def _start(self, *command: str, name: str | None = None) -> None:
        name = name or command[0]
        with (self.folder / f"{name}.log").open("a") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _environ(self, process: psutil.Process) -> dict[str, str]:
        with suppress(psutil.Error):
            return process.environ()
        return {}

    def _processes(self) -> list[psutil.Process]:
        """Returns the processes with this Slurm's SLURM_CONF: its daemons, the jobs and their child processes."""
        conf = self.env["SLURM_CONF"]
        return [process for process in psutil.process_iter() if self._environ(process).get("SLURM_CONF") == conf]

    def _kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def real_slurm() -> Iterator[Slurm]:
    """Yields a Slurm with two idle nodes; skips the test if Slurm is not installed or cannot start."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed (Debian packages slurm-wlm and munge)")
    if os.geteuid() != 0:
        pytest.skip("slurmd runs as root only")
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short, for munge's socket
    slurm = Slurm(folder)
    try:
        try:
            slurm.start()
        except AssertionError as error:
            pytest.skip(f"Slurm cannot be started on this machine: {error}")
        yield slurm
    finally:
        slurm.close()
        shutil.rmtree(folder, ignore_errors=True)
