"""The batch script: what it asks Slurm for, what is refused, and what it does with stubs of Slurm and Ray."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.cluster.ports import free_port, is_reachable
from tests.launch.conftest import wait_until

# Stubs: `srun` (two tasks, forwards SIGUSR1), Ray, the wait for the nodes, the run and `scontrol`.
_STUBS = {
    "srun": """
        echo "$*" >> srun.args
        while [[ $1 == --* ]]; do shift; done
        for SLURM_NODEID in 0 1; do
            SLURM_NODEID=$SLURM_NODEID SLURM_CPUS_ON_NODE=$((SLURM_NODEID + 3)) setsid "$@" & pids+=" -$!"
        done
        trap 'kill -USR1 $pids' USR1
        wait; wait""",
    "ray": """
        echo "$*" >> "ray$SLURM_NODEID.args"; env > "ray$SLURM_NODEID.env"; echo $$ > "ray$SLURM_NODEID.pid"
        [[ $2 == --head ]] && exec {python} -c "import os, socket, time
        s = socket.create_server(('127.0.0.1', int(os.environ['port']))); time.sleep(1000)"
        exec sleep 1000""",
    "python": """
        echo "$*" > python.args""",
    "densenet": """
        echo "$*" > densenet.args; env > densenet.env
        trap 'touch asked; sleep 1; exit 143' TERM
        touch started
        for i in {{1..3000}}; do [[ -e end ]] && exit "$(cat end)"; sleep 0.1; done""",
    "scontrol": """
        echo "$*" >> scontrol.args""",
}


@pytest.fixture
def render(densenet, tmp_path) -> Callable[..., str]:
    """`render(*options)`: the script of a run `first` of the demo."""

    def run(*options: str, run_name: str = "first") -> str:
        code, printed = densenet("slurm", "render", "demo", f"run.name={run_name}", *options)
        assert code == 0, printed
        return printed

    return run


def asked(script: str) -> list[str]:
    """What a script asks Slurm for."""
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_script_asks_for_what_the_options_say(render, tmp_path):
    counts = ("--nodes", "2", "--cpus-per-node", "8")
    script = render(*counts, "--time", "24:00:00", "--partition", "gpu", "--account", "a")
    assert asked(script) == [
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
    options = asked(render("--nodes", "4", "--gpus-per-node", "8", "cluster.workers={min: 8, max: 32, step: 8}"))
    assert {"--exclusive", "--mem=0", "--gpus-per-node=8", "--no-kill"} <= set(options)
    assert not [option for option in options if option.startswith(("--cpus", "--time", "--partition", "--account"))]


def test_the_script_is_bash_and_quotes_what_it_is_given(render, tmp_path):
    script = tmp_path / "s.sbatch"
    script.write_text(render("run.output=a b/$HOME'", "--nodes", "2"))
    subprocess.run(["bash", "-n", script], check=True)
    line = next(line for line in script.read_text().splitlines() if line.startswith("train=("))
    shown = subprocess.run(["bash", "-c", line + '; printf "%s\\n" "${train[@]}"'], capture_output=True, text=True)
    assert shown.stdout.splitlines() == ["densenet", "train", "demo", "run.name=first", "run.output=a b/$HOME'"]
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.name=null"], "run.name=None must be set, because a requeued job resumes the run"),
        (["run.name=a b"], "run.name=a b must be set"),
        (["--nodes", "0"], "--nodes=0 must be a whole number of at least 1."),
        (["--cpus-per-node", "0"], "--cpus-per-node=0 must be a whole number of at least 1."),
        (["--gpus-per-node", "-1"], "--gpus-per-node=-1 must be a whole number of at least 0."),
        (["--grace", "0"], "--grace=0 must be a whole number of at least 1."),
        (["--partition", "a b"], "--partition=a b is not a valid name"),
        (["--partition", "a\n#SBATCH --x"], "is not a valid name"),
        (["--account", ""], "--account= is not a valid name"),
        (["--time", "tomorrow"], "--time=tomorrow is not a time limit that sbatch accepts: use minutes"),
        (["--time", "2"], "--time=2 is 120 s, and --grace=120 s of them are for the last checkpoint"),
        (["--time", "0-0:1:59"], "--time=0-0:1:59 is 119 s"),
        (["cluster.workers=5", "--nodes", "2", "--cpus-per-node", "2"], "--nodes=2 --cpus-per-node=2"),
        (["device=cuda", "--cpus-per-node", "2"], "device=cuda needs GPUs"),
        (["train.epochs=-1"], "train.epochs: must be greater than 0"),
    ],
)
def test_what_cannot_be_run_is_refused(densenet, options, message):
    code, printed = densenet("slurm", "render", "demo", "run.name=first", *options)
    assert (code, message in printed) == (2, True), printed


@pytest.mark.parametrize("time", ["3", "2:01", "0:02:01", "1-0", "1-0:0", "2-12:30:00"])
def test_sbatchs_forms_of_a_time_limit_are_taken(render, time):
    assert f"--time={time}" in asked(render("--time", time))


class StubRun:
    """The script, run with the stubs in a folder."""

    def __init__(self, folder: Path, script: str, job: int, **env: str) -> None:
        self.folder, self.job = folder, job
        (folder / "script").write_text(script)
        self.tmpdir = folder / "a-temporary-folder-with-a-path-that-is-too-long-for-the-sockets-of-ray-and-others"
        self.tmpdir.mkdir()
        given = {
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NUM_NODES": "2",
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
        wait_until(lambda: (folder / "started").exists() and (folder / "ray1.pid").exists(), self.output)

    def output(self) -> str:
        return "\n".join(f"{f.name}: {f.read_text()}" for f in self.folder.iterdir() if f.is_file())

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def variables(self, name: str) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.read(name).splitlines() if "=" in line)

    def exit_code(self) -> int:
        """The exit code; after it nothing is left of Ray."""
        code = self.process.wait(timeout=120)
        for node in range(2):
            pid = int(self.read(f"ray{node}.pid"))
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), self.output)
            assert not os.path.lexists(f"/tmp/ray-{self.job}-{node}")
        return code


@pytest.fixture
def run_script(densenet, tmp_path) -> Iterator[Callable[..., StubRun]]:
    """`run_script(**env)` runs the script of a run `first` with the stubs."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in _STUBS.items():
        body = "\n".join(line.removeprefix(" " * 8) for line in text.format(python=sys.executable).splitlines())
        (bin_folder / name).write_text("#!/bin/bash" + body + "\n")
        (bin_folder / name).chmod(0o755)
    _, script = densenet("slurm", "render", "demo", "run.name=first", "--nodes", "2")
    script = script.replace(f"export PATH={Path(sys.executable).parent}:", f"export PATH={bin_folder}:")
    started: list[StubRun] = []

    def run(**env: str) -> StubRun:
        job = free_port()  # as good as any number, and no other test's
        while is_reachable("127.0.0.1", 20000 + job % 2500 * 4, 1):
            job += 1
        started.append(StubRun(tmp_path, script, job, **env))
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
    assert stub_run.read("python.args") == f"-P -m launch.cluster.nodes 127.0.0.1:{port} 2\n"
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


def test_the_signal_before_the_time_limit_requeues_the_job(run_script):
    stub_run = run_script()
    stub_run.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: (stub_run.folder / "asked").exists(), stub_run.output)
    stub_run.process.send_signal(signal.SIGTERM)  # the exit code is still that of the run
    assert stub_run.exit_code() == 143
    assert stub_run.read("scontrol.args") == f"requeue {stub_run.job}\n"
