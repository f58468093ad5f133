"""Self-tests of the installation, with a fix for each failure."""

import importlib.metadata
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config_fields import Device
from pipeline.derived import derive

_REINSTALL = "run `make clean test` in the project's folder, or `pip install --require-hashes -r requirements.lock`"


@dataclass(frozen=True)
class Check:
    """A component's check: its distribution, for the version, its self-test, and the fix if that fails.

    The self-test returns a short result, and raises on any problem.
    """

    name: str
    distribution: str
    test: Callable[[], str]
    fix: str = _REINSTALL


@dataclass(frozen=True)
class Finding:
    """The result of a check; `fix` is None if the component works."""

    name: str
    version: str
    result: str
    seconds: float
    fix: str | None


def run_checks() -> Iterator[Finding]:
    """Runs all checks, one after another."""
    for check in CHECKS:
        started, works = time.perf_counter(), False
        try:
            version = importlib.metadata.version(check.distribution)
            with redirect_stdout(io.StringIO()):  # DeepSpeed's log
                result, works = f"ok: {check.test()}", True
        except importlib.metadata.PackageNotFoundError:
            version, result = "-", "missing"
        except Exception as error:  # this command reports any problem of an installation
            result = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield Finding(check.name, version, result, time.perf_counter() - started, None if works else check.fix)


def _torch() -> str:
    import torch

    x = torch.ones(256, 256, requires_grad=True)
    (x @ x).sum().backward()
    if not torch.cuda.is_available():
        return f"a gradient on the CPU, {torch.get_num_threads()} threads; no CUDA device"
    y = torch.ones(256, 256, device="cuda", requires_grad=True)
    (y @ y).sum().backward()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"a gradient on the CPU and on CUDA {torch.version.cuda}: {', '.join(names)}"


def _timm() -> str:
    import torch

    from pipeline.model.densenet import create

    logits = create("densenet_tiny", 10)(torch.zeros(2, 3, 32, 32))
    return f"a DenseNet's forward pass, logits {list(logits.shape)}"


def _dali() -> str:
    import numpy as np
    import torch
    from PIL import Image

    from pipeline.data.dali import Loader
    from pipeline.data.dataset import open_split
    from pipeline.data.plan import EvalPlan

    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "val", "class", "image.jpg")
        image.parent.mkdir(parents=True)
        Image.fromarray(np.full((48, 64, 3), 128, np.uint8)).save(image)
        index = open_split(Path(folder), "val", Path(folder, "index"))
        plan = EvalPlan(index.widths_N, index.heights_N, resize=32, crop=32)
        with Loader(
            index,
            device=device,
            device_id=0 if device == "cuda" else None,
            threads=1,
            max_batch_size=1,
            interpolation="bilinear",
            mean=(0, 0, 0),
            std=(1, 1, 1),
        ) as loader:
            (batch,) = loader.run([plan.batch(np.array([0]))])
    return f"a JPEG decoded on {device} to {list(batch.images_NCHW.shape)}, mean {batch.images_NCHW.mean():.3f} of 1"


def _deepspeed() -> str:
    import torch

    from pipeline.model.densenet import create
    from pipeline.train.engine import Engine
    from pipeline.train.process_group import process_group

    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder, process_group(Path(folder) / "store", backend=backend):
        config = RunConfig.model_validate({"train": {"global_batch_size": 2, "epochs": 1}})
        derived = derive(
            config, workers=1, cpus_per_worker=1, device=device, train_samples=2, val_samples=1, num_classes=10
        )
        engine = Engine(config, derived, create("densenet_tiny", 10), torch.device(device))
        engine.backward(engine.forward(torch.zeros(2, 3, 32, 32, device=device)).square().mean())
        engine.step()
    return f"one optimizer step at ZeRO stage {derived.zero_stage} on {device}, {derived.precision}"


def _ray() -> str:
    from launch.cluster.connect import run_test_task
    from launch.cluster.local_ray import embedded_ray

    with tempfile.TemporaryDirectory() as folder, embedded_ray(1, Path(folder, "ray.log")):
        return f"a task ran in process {run_test_task()} of an embedded Ray"


def _mlflow() -> str:
    from pipeline.tracking.run import Tracker

    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.model_validate(
            {"run": {"output": folder}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}
        )
        with Tracker(config, Path(folder, "run"), "doctor", print) as tracker:
            tracker.log_metrics({"self-test": 1.0}, samples_seen=1)
        if tracker.unsent:
            raise RuntimeError(f"{tracker.unsent} records were not sent")
    return "a run stored in SQLite"


CHECKS = (
    Check("torch", "torch", _torch),
    Check("timm", "timm", _timm),
    Check(
        "DALI", "nvidia-dali-cuda130", _dali, "DALI needs Linux and, on a GPU, a driver for CUDA 13; else " + _REINSTALL
    ),
    Check("DeepSpeed", "deepspeed", _deepspeed),
    Check("Ray", "ray", _ray, "read the log that the error names; else " + _REINSTALL),
    Check("MLflow", "mlflow", _mlflow),
)
