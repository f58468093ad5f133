"""The demo under a real Slurm with two nodes on this machine: cancel, requeue, time limit, lost nodes, shared nodes."""

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.train.checkpoint import checkpoint_root, latest_valid, samples_of
from tests.conftest import BIN
from tests.launch.conftest import wait_until
from tests.launch.slurm.real_slurm import Slurm, real_slurm

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
WAIT_S = 600  # a job's start takes a minute or two on a busy machine
EPOCHS = ["train.epochs=400", "eval.every_epochs=5"]  # no test waits for the last epoch


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with real_slurm() as started:
        yield started


@pytest.fixture(autouse=True)
def no_jobs_left(slurm) -> Iterator[None]:
    yield
    slurm.end_jobs()


class Job:
    """A job of the demo."""

    def __init__(self, slurm: Slurm, folder: Path, name: str, *options: str, **env: str) -> None:
        self.slurm, self.folder, self.name = slurm, folder, name
        words = ["slurm", "render", "demo", f"run.name={name}", f"run.output={folder}", *options]
        done = subprocess.run([BIN / "densenet", *words], cwd=folder, env=slurm.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        script = folder / f"{name}.sbatch"
        script.write_text(done.stdout)
        self.number = slurm.run("sbatch", "--parsable", script, **env)

    @property
    def output(self) -> str:
        file = self.folder / f"{self.name}-{self.number}.out"
        return file.read_text() if file.exists() else ""

    def field(self, key: str) -> str:
        """Returns a field of `scontrol show job`."""
        shown = self.slurm.run("scontrol", "show", "job", self.number)
        (value,) = re.findall(rf"\b{key}=(\S+)", shown)
        return value

    def wait_for(self, condition: Callable[[], object]) -> None:
        wait_until(condition, self._logs, WAIT_S)

    def wait_for_state(self, state: str) -> None:
        self.wait_for(lambda: self.field("JobState") == state)

    def wait_for_training(self, start: int = 0) -> None:
        """Waits for a log line of the run after the job's `start`-th restart."""
        self.wait_for(lambda: re.search(r"^epoch .* loss", self._since(start), re.MULTILINE))

    def stopped_at(self, start: int = 0) -> int:
        """Waits until the driver reports that it was stopped; returns the samples."""
        found: list[str] = []

        def stopped() -> bool:
            found[:] = re.findall(r"stopped by SIGTERM at ([\d,]+) samples", self._since(start))
            return bool(found)

        self.wait_for(stopped)
        return int(found[0].replace(",", ""))

    def resumed_at(self, start: int) -> int:
        """Returns the samples at which the run resumed after the job's `start`-th restart."""
        self.wait_for_training(start)
        return int(re.findall(r"^resumed at (\d+) samples", self._since(start), re.MULTILINE)[0])

    def wait_for_checkpoint(self) -> None:
        self.wait_for(lambda: latest_valid(checkpoint_root(self.folder / self.name), lambda skipped: None))

    def latest(self) -> int:
        """Returns the samples of the latest checkpoint; fails if it is not valid."""
        path = latest_valid(checkpoint_root(self.folder / self.name), lambda skipped: pytest.fail(str(skipped)))
        assert path is not None
        return samples_of(path)

    def _since(self, start: int) -> str:
        """Returns the output after the job's `start`-th restart; the plan begins with the run's name."""
        parts = re.split(r"^run  +", self.output, flags=re.MULTILINE)[1:]
        return parts[start] if start < len(parts) else ""

    def _logs(self) -> str:
        logs = "\n".join(file.read_text() for file in self.folder.glob("*.log"))
        return f"{self.output}\n{logs}\n{self.slurm.run('scontrol', 'show', 'job', self.number)}\n{self.slurm.logs()}"


TWO_NODES = ("--nodes", "2", "--cpus-per-node", "2", "cluster.cpus_per_worker=2")  # a worker fills a node


def test_a_requeued_job_resumes_and_a_canceled_one_ends_after_a_checkpoint(slurm, tmp_path):
    long = tmp_path / ("a-folder-of-the-job-as-sites-make-them" * 3)
    long.mkdir()
    # torchrun's variables and a long TMPDIR: neither has an effect
    variables = {"RANK": "7", "WORLD_SIZE": "99", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere", "TMPDIR": str(long)}
    job = Job(slurm, tmp_path, "run", *TWO_NODES, *EPOCHS, **variables)
    job.wait_for_training()
    assert job.field("NumNodes") == "2"
    slurm.run("scontrol", "requeue", job.number)
    stopped = job.stopped_at()
    assert job.resumed_at(1) == stopped
    assert job.field("Restarts") == "1"
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)  # a canceled job is not requeued
    slurm.run("scancel", job.number)
    stopped = job.stopped_at(1)
    assert job.latest() == stopped
    job.wait_for_state("CANCELLED")
    job.wait_for(lambda: set(slurm.states().values()) == {"idle"})
    assert not list(Path("/tmp").glob(f"ray-{job.number}-*"))
    assert not list(long.glob("ray.*"))


def test_the_time_limits_signal_requeues_the_job_and_the_run_completes(slurm, tmp_path):
    job = Job(slurm, tmp_path, "run", *TWO_NODES, "train.epochs=6")
    job.wait_for_training()
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    stopped = job.stopped_at()
    assert job.resumed_at(1) == stopped
    job.wait_for_state("COMPLETED")
    assert job.field("ExitCode") == "0:0"
    assert job.latest() == 135 * 64
    assert "version 1, alias candidate" in job.output


def test_a_job_whose_node_is_lost_is_requeued_and_resumes(slurm, tmp_path):
    job = Job(slurm, tmp_path, "run", *TWO_NODES, *EPOCHS)
    job.wait_for_checkpoint()
    slurm.kill_node("node2")
    job.wait_for(lambda: job.field("Restarts") == "1")
    slurm.start_node("node2")
    assert job.resumed_at(1) > 0
    slurm.run("scancel", job.number)
    job.wait_for_state("CANCELLED")


def test_an_elastic_job_continues_without_a_lost_node(slurm, tmp_path):
    job = Job(slurm, tmp_path, "run", *TWO_NODES, *EPOCHS, "cluster.workers={min: 1, max: 2}")
    job.wait_for_checkpoint()
    slurm.kill_node("node2")
    job.wait_for(lambda: "the run now has 1 workers, previously 2" in job.output)
    job.wait_for(lambda: slurm.states()["node2"].startswith("down"))
    assert job.field("JobState") == "RUNNING"
    slurm.run("scancel", job.number)
    job.wait_for_state("CANCELLED")
    slurm.start_node("node2")


def test_two_jobs_share_a_node(slurm, tmp_path):
    options = ("--cpus-per-node", "1", "cluster.workers=1", "train.epochs=2")
    jobs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        jobs.append(Job(slurm, tmp_path / name, name, *options))
    for job in jobs:
        job.wait_for_state("COMPLETED")
        assert job.field("NodeList") == "node1"
        assert job.latest() == 45 * 64


def test_a_job_whose_ray_does_not_start_fails_and_names_the_logs(slurm, tmp_path):
    number = int(slurm.run("sbatch", "--parsable", "--hold", "--wrap=true"))
    slurm.run("scancel", str(number))
    with socket.create_server(("", 20000 + (number + 1) % 2500 * 4)):
        job = Job(slurm, tmp_path, "run", *TWO_NODES)
        job.wait_for_state("FAILED")
    assert job.number == str(number + 1)
    assert job.field("ExitCode") == "1:0"
    assert job.field("Restarts") == "0"
    assert f"error: Ray ended before 2 nodes had joined: read run-{job.number}-ray-*.log." in job.output
    assert not list(Path("/tmp").glob(f"ray-{job.number}-*"))


def test_bad_input_ends_the_job_with_its_exit_code(slurm, tmp_path):
    job = Job(slurm, tmp_path, "run", "--cpus-per-node", "1", "cluster.workers=1", "data.root=/nowhere")
    job.wait_for_state("FAILED")
    assert job.field("ExitCode") == "2:0"
    assert "/nowhere" in job.output
