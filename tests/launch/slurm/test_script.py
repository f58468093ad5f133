"""The batch script: its directives, refused input, and its behavior with stubs of Slurm and Ray."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launch.cluster.ports import free_port, is_reachable
from launch.slurm.script import SlurmOptions
from launch.slurm.script import render as render_script
from pipeline.config_file import load_config
from tests.launch.conftest import wait_until

CONFIG = load_config(Path("demo"), "run.name=first")
OPTIONS = SlurmOptions(nodes=2, cpus_per_node=8, gpus_per_node=0, time=None, partition=None, account=None, grace_s=120)

# Stubs: `srun` (two tasks, forwards SIGUSR1), Ray, the wait for the nodes, the run and Slurm's other commands.
_STUBS = {
    "srun": """
        echo "$*" >> srun.args
        while [[ $1 == --* ]]; do shift; done
        for SLURM_NODEID in 0 1; do
            SLURM_NODEID=$SLURM_NODEID SLURM_CPUS_ON_NODE=$((SLURM_NODEID + 3)) setsid "$@" & pids+=" -$!"
        done
        trap 'kill -USR1 $pids' USR1
        for group in $pids; do until kill -0 "$group" 2> /dev/null; do sleep 0.1; done; done
        echo $$ > srun.pid
        wait; wait""",
    "ray": """
        [[ $2 == --head && -e no-head ]] && exit 1
        echo "$*" >> "ray$SLURM_NODEID.args"; env > "ray$SLURM_NODEID.env"; echo $$ > "ray$SLURM_NODEID.pid"
        [[ $2 == --head ]] && exec {python} -c "import os, signal, socket
        s = socket.create_server(('127.0.0.1', int(os.environ['port']))); signal.pause()"
        exec sleep 1000""",
    "python": """
        echo "$*" > python.args
        if [[ -e no-head ]]; then timeout 60 tail --pid="$7" -f /dev/null; exit 1; fi""",
    "densenet": """
        echo "$*" > densenet.args; env > densenet.env
        trap 'touch stopping; sleep 1; exit "$(cat end 2> /dev/null || echo 143)"' TERM
        touch started
        for i in {{1..3000}}; do [[ -e end && ! -e stopping ]] && exit "$(cat end)"; sleep 0.1; done""",
    "scontrol": """
        echo "$*" >> scontrol.args""",
    "scancel": """
        echo "$*" >> scancel.args
        until [[ -s srun.pid ]]; do sleep 0.1; done
        kill -USR1 "$(cat srun.pid)" """,
    "squeue": """
        cat state""",
}


@pytest.fixture
def render(densenet, tmp_path) -> Callable[..., str]:
    """`render(*options)`: the script of a run `first` of the demo."""

    def run(*options: str, run_name: str = "first") -> str:
        code, printed = densenet("slurm", "render", "demo", f"run.name={run_name}", *options)
        assert code == 0, printed
        return printed

    return run


def directives(script: str) -> list[str]:
    """Returns the options in a script's `#SBATCH` lines."""
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_options_become_directives(render, tmp_path):
    counts = ("--nodes", "2", "--cpus-per-node", "8")
    script = render(*counts, "--time", "24:00:00", "--partition", "gpu", "--account", "a")
    assert directives(script) == [
        "--job-name=first",
        "--output=%x-%j.out",
        "--open-mode=append",
        f"--chdir={tmp_path}",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        "--time=24:00:00",
        "--partition=gpu",
        "--account=a",
        "--signal=B:USR1@120",
        "--requeue",
    ]
    assert "\ntrain=(densenet train demo run.name=first)\n" in script
    assert f"\nexport PATH={Path(sys.executable).parent}:$PATH\n" in script


def test_whole_nodes_gpus_and_elastic_workers(render):
    options = directives(render("--nodes", "4", "--gpus-per-node", "8", "cluster.workers={min: 8, max: 32, step: 8}"))
    assert {"--exclusive", "--mem=0", "--gpus-per-node=8", "--no-kill"} <= set(options)
    assert not [option for option in options if option.startswith(("--cpus", "--time", "--partition", "--account"))]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=4))
@example(
    ["run.output=a b/$HOME'", 'run.output="`id`"', "x=$(id)", "x=\\", "x=!!", "#SBATCH --x\n#SBATCH --y", "x=*", ""]
)
def test_bash_gets_the_overrides_unchanged(overrides):
    with patch("launch.slurm.script.load_config", lambda *_: CONFIG):
        script = render_script(Path("demo"), overrides, OPTIONS)
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    command = script[script.index("\ntrain=(") : script.index("\n\n# Ray")] + '\nprintf "%s\\0" "${train[@]}"'
    shown = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert shown.stdout.decode().split("\0")[:-1] == ["densenet", "train", "demo", *overrides]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_accepts_the_script(render):
    subprocess.run(["shellcheck", "-"], input=render("--nodes", "2"), text=True, check=True)


@pytest.mark.parametrize("folder", ["a b", "it's", 'a "b"', "$HOME"])
def test_the_working_folder_is_quoted(densenet, tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    script = render_script(Path("demo"), ["run.name=first"], OPTIONS)
    (directive,) = [option for option in directives(script) if option.startswith("--chdir=")]
    assert shlex.split(directive) == [f"--chdir={tmp_path / folder}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.name=null"], "run.name=null must be set to letters, digits"),
        (
            ["run.name=a b"],
            "run.name=a b must be set to letters, digits, dots, hyphens and underscores, for example run.name=first",
        ),
        (["--nodes", "0"], "--nodes=0 must be an integer of at least 1."),
        (["--cpus-per-node", "0"], "--cpus-per-node=0 must be an integer of at least 1."),
        (["--gpus-per-node", "-1"], "--gpus-per-node=-1 must be an integer of at least 0."),
        (["--grace", "0"], "--grace=0 must be an integer of at least 1."),
        (["--partition", "a b"], "--partition=a b is not a valid name"),
        (["--partition", "a\n#SBATCH --x"], "is not a valid name"),
        (["--account", ""], "--account= is not a valid name"),
        (["--time", "tomorrow"], "--time=tomorrow is not a time limit: use minutes"),
        (["--time", "2"], "--time=2 is 120 s and must be longer than --grace=120 s"),
        (["--time", "0-0:1:59"], "--time=0-0:1:59 is 119 s"),
        (
            ["cluster.workers=4", "cluster.cpus_per_worker=2", "--nodes", "2", "--cpus-per-node", "2"],
            "--nodes=2 --cpus-per-node=2 --gpus-per-node=0 has 4: set fewer cluster.workers or a smaller "
            "cluster.cpus_per_worker, or request more nodes with --nodes.",
        ),
        (["device=cuda", "--cpus-per-node", "2"], "device=cuda needs GPUs"),
        (["train.epochs=-1"], "train.epochs: must be greater than 0"),
    ],
)
def test_bad_input_is_refused(densenet, options, message):
    code, printed = densenet("slurm", "render", "demo", "run.name=first", *options)
    assert (code, message in printed) == (2, True), printed


@pytest.mark.parametrize("time", ["3", "2:01", "0:02:01", "1-0", "1-0:0", "2-12:30:00"])
def test_time_limits_in_the_formats_of_sbatch(render, time):
    assert f"--time={time}" in directives(render("--time", time))


class StubRun:
    """The script, run with the stubs in a folder."""

    def __init__(self, folder: Path, script: str, job: int, env: dict[str, str], no_head: bool) -> None:
        self.folder, self.job = folder, job
        (folder / "script").write_text(script)
        self.tmpdir = folder / "a-temporary-folder-with-a-path-that-is-too-long-for-the-sockets-of-ray-and-others"
        self.tmpdir.mkdir()
        given = {
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_STEP_ID": "0",
            "SLURM_JOB_NAME": "first",
            "SLURM_GPUS_ON_NODE": "4",
            "TMPDIR": str(self.tmpdir),
        }
        log = (folder / "out").open("w")
        self.process = subprocess.Popen(
            ["bash", folder / "script"],
            cwd=folder,
            env=os.environ | given | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()
        if not no_head:
            wait_until(lambda: (folder / "started").exists() and (folder / "ray1.pid").exists(), self.output)

    def output(self) -> str:
        return "\n".join(f"{f.name}: {f.read_text()}" for f in self.folder.iterdir() if f.is_file())

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def variables(self, name: str) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.read(name).splitlines() if "=" in line)

    def exit_code(self) -> int:
        """Returns the exit code, after Ray has ended on all nodes."""
        code = self.process.wait(timeout=120)
        for node in range(2):
            if (self.folder / f"ray{node}.pid").exists():
                pid = int(self.read(f"ray{node}.pid"))
                wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), self.output)
            wait_until(lambda node=node: not os.path.lexists(f"/tmp/ray-{self.job}-{node}"), self.output)
        return code


@pytest.fixture
def run_script(densenet, tmp_path) -> Iterator[Callable[..., StubRun]]:
    """`run_script(**env)` runs the script of a run `first` with the stubs; with `no_head`, Ray's head fails."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in _STUBS.items():
        body = "\n".join(line.removeprefix(" " * 8) for line in text.format(python=sys.executable).splitlines())
        (bin_folder / name).write_text("#!/bin/bash" + body + "\n")
        (bin_folder / name).chmod(0o755)
    _, script = densenet("slurm", "render", "demo", "run.name=first", "--nodes", "2")
    script = script.replace(f"export PATH={Path(sys.executable).parent}:", f"export PATH={bin_folder}:")
    started: list[StubRun] = []

    def run(no_head: bool = False, **env: str) -> StubRun:
        if no_head:
            (tmp_path / "no-head").touch()
        job = free_port()  # no other test has this number
        while is_reachable("127.0.0.1", 20000 + job % 2500 * 4, 1):
            job += 1
        started.append(StubRun(tmp_path, script, job, env, no_head))
        return started[-1]

    yield run
    for stub_run in started:
        if stub_run.process.poll() is None:
            os.killpg(stub_run.process.pid, signal.SIGKILL)
            stub_run.process.wait()


def test_ray_is_started_on_all_nodes_and_the_exit_code_is_that_of_the_run(run_script):
    stub_run = run_script(RANK="7", WORLD_SIZE="99", MASTER_ADDR="nowhere")
    (stub_run.folder / "end").write_text("3")
    assert stub_run.exit_code() == 3
    assert not (stub_run.folder / "scontrol.args").exists()
    port = 20000 + stub_run.job % 2500 * 4
    head, other = stub_run.read("ray0.args"), stub_run.read("ray1.args")
    assert head.startswith(f"start --head --node-ip-address=127.0.0.1 --port={port} --dashboard-port={port + 1} ")
    assert f"--ray-client-server-port={port + 2} " in head
    assert other.startswith(f"start --address=127.0.0.1:{port} ")
    for node, arguments in enumerate((head, other)):
        assert f"--temp-dir=/tmp/ray-{stub_run.job}-{node} " in arguments
        assert f"--num-cpus={node + 3} --num-gpus=4" in arguments
        assert stub_run.variables(f"ray{node}.env")["TMPDIR"] == f"/tmp/ray-{stub_run.job}-{node}"
    assert not list(stub_run.tmpdir.iterdir())
    wait_for_nodes = stub_run.read("python.args")
    assert wait_for_nodes.startswith(f"-P -m launch.cluster.nodes 127.0.0.1:{port} 2 --pid ")
    assert wait_for_nodes.endswith(f" --logs first-{stub_run.job}-ray-*.log\n")
    training = stub_run.variables("densenet.env")
    assert training["RAY_ADDRESS"] == f"127.0.0.1:{port}"
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & training.keys()
    token = training["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    assert token == stub_run.variables("ray1.env")["RAY_AUTH_TOKEN"]
    assert token not in stub_run.read("srun.args") + head + other + stub_run.read("script")


def test_sigterm_ends_the_training_and_does_not_reach_ray(run_script):
    stub_run = run_script()
    ray = int(stub_run.read("ray1.pid"))
    os.kill(ray, signal.SIGTERM)  # as `scancel` does
    stub_run.process.send_signal(signal.SIGTERM)
    assert Path(f"/proc/{ray}").exists()
    assert stub_run.exit_code() == 143
    assert not (stub_run.folder / "scontrol.args").exists()


@pytest.mark.parametrize("state", ["RUNNING None", "COMPLETING TimeLimit"])
def test_the_signal_before_the_time_limit_requeues_the_job(run_script, state):
    stub_run = run_script()
    (stub_run.folder / "state").write_text(state)
    stub_run.process.send_signal(signal.SIGUSR1)
    stub_run.process.send_signal(signal.SIGTERM)  # at the time limit
    assert stub_run.exit_code() == 143
    assert stub_run.read("scontrol.args") == f"requeue {stub_run.job}\n"


@pytest.mark.parametrize("end", ["0", "1", "2"])
def test_a_run_that_ends_by_itself_is_not_requeued(run_script, end):
    stub_run = run_script()
    (stub_run.folder / "state").write_text("RUNNING None")
    stub_run.process.send_signal(signal.SIGUSR1)
    wait_until((stub_run.folder / "stopping").exists, stub_run.output)
    (stub_run.folder / "end").write_text(end)
    assert stub_run.exit_code() == int(end)
    assert not (stub_run.folder / "scontrol.args").exists()


def test_a_job_canceled_before_its_time_limit_is_not_requeued(run_script):
    stub_run = run_script()
    (stub_run.folder / "state").write_text("COMPLETING None")
    stub_run.process.send_signal(signal.SIGUSR1)
    wait_until((stub_run.folder / "stopping").exists, stub_run.output)
    stub_run.process.send_signal(signal.SIGTERM)
    assert stub_run.exit_code() == 143
    assert not (stub_run.folder / "scontrol.args").exists()


def test_ray_ends_on_all_nodes_if_the_head_does_not_start(run_script):
    stub_run = run_script(no_head=True)
    assert stub_run.exit_code() == 1
    assert not (stub_run.folder / "started").exists()
    assert stub_run.read("scancel.args") == f"--signal=USR1 {stub_run.job}.0\n"
