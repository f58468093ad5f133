"""Shared fixtures: the command line, a small image set, and process groups of one or several ranks."""

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import settings
from PIL import Image

from pipeline.data.dataset import open_splits
from pipeline.data.index import DatasetIndex
from pipeline.train.process_group import ENV_VARIABLES, process_group

# Ranks and commands are forked from a server that has imported the heavy packages once and started no threads.
multiprocessing.set_forkserver_preload(["torch", "timm", "deepspeed", "pipeline.train.trainer", "mlflow.pyfunc"])
os.environ["DS_ACCELERATOR"] = "cpu"
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))) > 1:
    # Threads beyond the cores wait for each other, here and in the processes of the tests.
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = f"{threads}"

BIN = Path(sys.executable).parent
# The same examples each time and no database: failures are reproducible.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

PROJECT = Path(__file__).resolve().parents[1]
SHARED = PROJECT / ".." / "shared" / "data"


@pytest.fixture(autouse=True)
def no_outer_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolates tests from the user's cluster and tracking server, and from variables that other tests set."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def imagenet_samples() -> Path:
    folder = (SHARED / "imagenet-samples").resolve()
    if not folder.is_dir():
        pytest.skip("the ImageNet sample images are not on this machine (../shared/data/imagenet-samples)")
    return folder


@pytest.fixture
def cifar10() -> Path:
    folder = (SHARED / "cifar10-jpeg").resolve()
    if not folder.is_dir():
        pytest.skip("the CIFAR-10 images are not on this machine (../shared/data/cifar10-jpeg)")
    return folder


@pytest.fixture
def indexes(tmp_path: Path) -> Callable[..., tuple[DatasetIndex, DatasetIndex]]:
    """`indexes(train=N, val=M, classes=K)`: images of 32 pixels whose brightness depends on the class."""

    def make(train: int = 40, val: int = 13, classes: int = 3) -> tuple[DatasetIndex, DatasetIndex]:
        rng = np.random.default_rng(0)
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                label = i % classes
                file = tmp_path / "set" / split / f"class{label}" / f"{i:03d}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                light = 40 + 170 * label / (classes - 1)
                pixels = np.clip(rng.normal(light, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(file, quality=95)
        return open_splits(str(tmp_path / "set"), "train", "val", tmp_path / "cache")

    return make


@pytest.fixture(scope="session")
def _group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One process group for all tests, since DeepSpeed caches groups; returns its environment variables."""
    with process_group(tmp_path_factory.mktemp("group") / "store"):
        yield {name: os.environ.pop(name) for name in ENV_VARIABLES}


@pytest.fixture
def one_rank(_group_of_one: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of one rank; subprocesses of later tests do not inherit its environment variables."""
    for name, value in _group_of_one.items():
        monkeypatch.setenv(name, value)


def _rank_main(rank: int, function: Callable[..., Any], workers: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    with process_group(folder / "store", rank, workers):
        try:
            torch.save(function(*args), folder / f"result{rank}.pt")
        except BaseException:  # any failure of a rank must be visible
            (folder / f"error{rank}.txt").write_text(traceback.format_exc())
            raise


@pytest.fixture
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`run_ranks(workers, function, *args)` runs a module-level function in each rank; returns all results."""

    def run(workers: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        try:
            mp.start_processes(_rank_main, (function, workers, folder, args), workers, start_method="forkserver")
        except Exception:
            for file in folder.glob("error*.txt"):
                print(file.read_text())
            raise
        return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(workers)]

    return run


@pytest.fixture
def densenet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """`densenet(*arguments)` runs the command in this process, in the test's folder; returns exit code and output."""

    def run(*arguments: object) -> tuple[int, str]:
        from launch.cli import main

        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["densenet", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out + printed.err

    return run


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`shell(program, *arguments, env={...})` runs a program of this environment in the project's folder."""

    def run(program: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [str(BIN / program), *arguments],
            cwd=PROJECT,
            env=os.environ | {"PATH": path} | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


@pytest.fixture
def forked_densenet(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Like `shell("densenet", ...)`, but the process is a fork, which need not import packages for seconds."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        output = tmp_path_factory.mktemp("command") / "output"
        environment = os.environ | (env or {})
        process = multiprocessing.get_context("forkserver").Process(
            target=_command_main, args=(arguments, dict(environment), output)
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read_text())

    return run


def _command_main(arguments: tuple[str, ...], environment: dict[str, str], output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(PROJECT)
    sys.argv = ["densenet", *arguments]
    from launch.cli import main

    main()
