"""Ray jobs on a local cluster: submitted files, exit codes, lists, logs and stops."""

import io
import json
import os
import re
import signal
from functools import partial
from pathlib import Path

import pexpect
import pytest

from tests.conftest import BIN, PROJECT
from tests.launch.conftest import WAIT_TIMEOUT_S, Cluster, wait_until

pytestmark = pytest.mark.slow


def uploaded_files(cluster: Cluster) -> set[str]:
    """Returns the names of all files in the working folders of the cluster's jobs."""
    packages = (cluster.folder / "0" / "session_latest" / "runtime_resources" / "working_dir_files").glob("_ray_pkg_*/")
    return {file.relative_to(package).as_posix() for package in packages for file in package.rglob("*")}


@pytest.fixture
def ignored_file() -> Path:
    """A file in a folder that `.gitignore` names."""
    file = PROJECT / "outputs" / "not-for-upload.bin"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"data")
    yield file
    file.unlink()


def test_the_demo_by_ray_job_submit_and_a_job_that_fails(cluster, shell, tmp_path, ignored_file):
    submit = ["job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--"]
    train = ["densenet", "train", "configs/demo.yaml"]
    done = shell("ray", *submit, *train, "train.epochs=2", f"run.output={tmp_path}", env=cluster.env)
    assert done.returncode == 0, done.stdout
    assert "top-1" in done.stdout
    assert "succeeded" in done.stdout
    assert list(tmp_path.glob("demo-*/checkpoints/samples-*/manifest.json"))
    names = uploaded_files(cluster)
    assert {"launch/cli/__init__.py", "pipeline/config.py", "configs/demo.yaml"} <= names
    assert not [name for name in names if name.startswith((".git/", ".venv/", "outputs/"))]

    failed = shell("ray", *submit, *train, "cluster.workers=4", f"run.output={tmp_path}", env=cluster.env)
    assert failed.returncode != 0
    assert "has 2: set fewer cluster.workers" in failed.stdout


def test_a_driver_joins_a_cluster_and_reads_its_resources(cluster, forked_densenet, tmp_path):
    arguments = ["configs/demo.yaml", f"run.output={tmp_path}", "--address", cluster.address]
    too_many = forked_densenet("plan", *arguments, "cluster.workers=4", env=cluster.env)
    assert too_many.returncode == 2
    assert f"the cluster at {cluster.address} has 2: set fewer cluster.workers" in too_many.stdout
    fitting = forked_densenet("plan", *arguments, env=cluster.env)
    assert fitting.returncode == 0, fitting.stdout
    assert "workers      2 on cpu, 1 CPU cores each" in fitting.stdout


def interrupt_submit(arguments: list[str], env: dict[str, str], answer: str) -> tuple[int, str]:
    """Presses Ctrl-C after the start of training, and answers the question; returns the exit code and the output."""
    printed = io.StringIO()
    environment = os.environ | env | {"COLUMNS": "200"}
    options = {"cwd": PROJECT, "env": environment, "encoding": "utf-8", "timeout": WAIT_TIMEOUT_S}
    default_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # child processes of xdist ignore SIGINT
    with pexpect.spawn(str(BIN / "densenet"), arguments, preexec_fn=default_sigint, **options) as child:
        child.logfile_read = printed
        child.expect("loading the model")
        child.sendintr()
        child.expect(r"\[y/N\]")
        child.sendline(answer)
        child.expect(pexpect.EOF)
    return child.exitstatus, printed.getvalue()


def test_submit_sends_only_the_code_and_a_job_is_listed_followed_and_stopped(cluster, forked_densenet, tmp_path):
    """A long training run stops after a checkpoint, and no worker is left."""
    before = uploaded_files(cluster)
    where = ["--address", cluster.dashboard]
    submit = ["submit", "configs/demo.yaml", f"run.output={tmp_path}", "--no-env", *where]
    long = [*submit, "run.name=long", "train.epochs=500", "cluster.workers=1"]
    code, printed = interrupt_submit(long, cluster.env, answer="n")
    assert code == 130, printed
    job = re.search(r"job (long-\d+) trains long", printed)[1]
    assert f"stop {job}? [y/N] n" in printed
    assert f"{job} continues; `densenet jobs logs {job} --follow` shows it" in " ".join(printed.split())

    again = forked_densenet(*long, env=cluster.env)
    assert again.returncode == 2
    assert f"the job {job} trains run.name=long already: `densenet jobs stop {job}` ends it" in again.stdout
    checkpoints = tmp_path / "long" / "checkpoints"
    wait_until(lambda: list(checkpoints.glob("samples-*/manifest.json")), lambda: f"no checkpoint in {checkpoints}")
    listed = forked_densenet("jobs", "list", *where, env=cluster.env).stdout
    assert re.search(rf"{job}\s+long\s+RUNNING", listed), listed
    known = json.loads(forked_densenet("jobs", "list", "--json", *where, env=cluster.env).stdout)
    assert [(one["metadata"]["run"], one["status"]) for one in known if one["submission_id"] == job] == [
        ("long", "RUNNING")
    ]
    stopped = forked_densenet("jobs", "stop", job, *where, env=cluster.env)
    assert f"{job} is stopped" in stopped.stdout
    logs = forked_densenet("jobs", "logs", job, *where, env=cluster.env).stdout
    assert re.search(r"stopped by SIGTERM at [\d,]+ samples, after a checkpoint", logs), logs
    followed = forked_densenet("jobs", "logs", job, "--follow", *where, env=cluster.env)
    assert followed.returncode == 143
    assert followed.stdout == logs
    wait_until(lambda: not cluster.processes("RayTrainWorker"), lambda: "a worker is left")
    new = uploaded_files(cluster) - before
    assert "job.yaml" in new
    assert not [
        name for name in new if not name.startswith(("pipeline", "launch", "job.yaml", "commit.json", "git.diff"))
    ]

    wide = forked_densenet(*submit, "run.name=wide", "cluster.workers=3", "--wait", "--detach", env=cluster.env)
    job = re.search(r"job (wide-\d+) trains wide", wide.stdout)[1]
    waiting = "waiting: 3 workers with 1 CPU cores each need 3, the cluster at"

    def printed() -> str:
        return forked_densenet("jobs", "logs", job, *where, env=cluster.env).stdout

    wait_until(lambda: waiting in printed(), printed)
    forked_densenet("jobs", "stop", job, *where, env=cluster.env)

    failed = forked_densenet(*submit, "run.name=short", "--secret", "NOT_THERE", env=cluster.env)
    assert failed.returncode == 2
    assert "error: NOT_THERE: not set on the cluster" in failed.stdout


def test_errors_of_submit_and_jobs(cluster, forked_densenet, tmp_path):
    where = ["--address", cluster.dashboard]
    messages = {
        ("submit", "configs/demo.yaml", "run.output=here", *where): "run.output=here must be an absolute path",
        (
            "submit",
            "configs/demo.yaml",
            f"run.output={tmp_path}",
            "data.root=x",
            *where,
        ): "data.root=x must be an absolute path or a URI",
        ("submit", "configs/demo.yaml", f"run.output={tmp_path}", "--env", "A_TOKEN=3", *where): "use --secret NAME",
        ("submit", "configs/demo.yaml", f"run.output={tmp_path}", "--env", "A", *where): "not of the form NAME=VALUE",
        ("jobs", "stop", "nothing", *where): "there is no job nothing; the jobs are: ",
        ("jobs", "list", "--address", "http://127.0.0.1:1"): "no Ray dashboard is reachable at http://127.0.0.1:1",
    }
    for arguments, message in messages.items():
        done = forked_densenet(*arguments, env=cluster.env)
        assert done.returncode == 2, arguments
        assert message in done.stdout, done.stdout
        assert "Traceback" not in done.stdout
    no_token = {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    done = forked_densenet("jobs", "list", *where, env=cluster.env | no_token)
    assert done.returncode == 2
    assert "requires a token: put the cluster's token into ~/.ray/auth_token" in done.stdout
