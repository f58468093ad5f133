"""GPU benchmarks: decoding, mixed precision, memory modes, torch.compile, ZeRO stages, NCCL.

    python -m benchmarks.gpu [--batch 128] [--rounds 5] [--images FOLDER] [--only NAME...]

Cases: `decode` (DALI on the GPU, DALI on the CPU, torchvision), `precision` (fp32, bf16, fp16; for reference timm's
published throughput on an RTX 3090), `memory` (throughput and peak memory of each memory mode), `compile`, `stages`
(DeepSpeed's ZeRO 0 to 3 and a plain loop), `feed` (the loader alone and the model alone), `nccl` (two GPUs and one). A
case whose packages are not installed is skipped. `--device cpu` tests the script itself and saves no results.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import common
from benchmarks.common import interleaved, load_images, machine, report, save_result, seconds

CLASSES = 1000
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
MODELS = ("densenet121", "densenet169", "densenet201", "densenet264")
# timm's results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv, images per second of training at 224 pixels; its
# `densenet264` is another model.
TIMM_RTX3090 = {"densenet121": 913.65, "densenet169": 752.52, "densenet201": 562.52}
Step = Callable[[], object]
PLAIN_LOOP = "plain PyTorch loop"


def main() -> None:
    """Runs every case that the machine and the installed packages support."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="training steps per round")
    parser.add_argument("--side", type=int, default=224, help="image size in pixels")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    if options.device == "cpu":
        common.RESULTS = Path(os.devnull)
    elif not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} finds no CUDA device")
        return
    print(f"{machine()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} devices")
    for name in options.only:
        if name == "nccl" and options.device == "cuda" and torch.cuda.device_count() < 2:
            print(f"\n{name}: skipped, there is one GPU")
            continue
        try:
            CASES[name](options)
        except ImportError as error:  # each case imports its packages before it starts
            if (error.name or "").startswith(("pipeline", "benchmarks")):
                raise  # an error of this project, not a missing package
            print(f"\n{name}: skipped, a package is not installed or fails to import: {error}")


def synchronize() -> None:
    """Waits for the GPU's queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def throughput(options: argparse.Namespace, step: Step, images: int = 0) -> Callable[[], float]:
    """Returns a function that measures images per second over some steps; `images` per step, a batch by default."""

    def measured() -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(options.steps):
            step()
        synchronize()
        return options.steps * (images or options.batch) / (time.perf_counter() - started)

    return measured


def training(
    options: argparse.Namespace, name: str, autocast: torch.dtype | None, memory: str = "none", compiled: bool = False
) -> Step:
    """Returns a plain PyTorch training step: mixed precision by autocast, channels last, SGD, loss scaling for fp16."""
    from pipeline.config import Model
    from pipeline.model.densenet import create

    model: nn.Module = create(Model(name=name, memory=memory), CLASSES)  # type: ignore[arg-type]
    model = model.to(options.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
    images_NCHW, labels_N = images(options)
    images_NCHW = images_NCHW.to(memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler(options.device, enabled=autocast == torch.float16)

    def step() -> None:
        with torch.autocast(options.device, autocast or torch.float16, enabled=autocast is not None):
            loss = F.cross_entropy(forward(images_NCHW), labels_N)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def images(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    images_NCHW = torch.randn(options.batch, 3, options.side, options.side, device=options.device)
    return images_NCHW, torch.randint(0, CLASSES, (options.batch,), device=options.device)


def precision(options: argparse.Namespace) -> None:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
    for name in options.models:
        cases = {case: throughput(options, training(options, name, dtype)) for case, dtype in dtypes.items()}
        values = interleaved(cases, options.rounds)
        report(f"training step, {name}, batch {options.batch}", values, "img/s", "bf16")
        if name in TIMM_RTX3090:
            print(f"  timm's published throughput on an RTX 3090, AMP: {TIMM_RTX3090[name]:,.0f} img/s")
            save_result(f"training step, {name}", "timm on an RTX 3090, as published", TIMM_RTX3090[name], "img/s")
        torch.cuda.empty_cache()


def memory(options: argparse.Namespace) -> None:
    for name in (options.models[0], options.models[-1]):
        cases: dict[str, Callable[[], float]] = {}
        peaks: dict[str, float] = {}
        for mode in ("none", "activation-checkpointing", "shared-stats"):
            before = torch.cuda.memory_allocated()
            step = training(options, name, torch.bfloat16, mode)
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step()
            peaks[mode] = (torch.cuda.max_memory_allocated() - before) / 1e6
            cases[mode] = throughput(options, step)
        values = interleaved(cases, options.rounds)
        for mode in ("activation-checkpointing", "shared-stats"):
            settings = f"{name}, model.memory={mode}, batch {options.batch}, bf16"
            report(f"training step, {settings}", {m: values[m] for m in (mode, "none")}, "img/s", mode)
            if options.device == "cuda":
                report(f"peak memory, {settings}", {m: [peaks[m]] for m in (mode, "none")}, "MB", mode)


def compiled(options: argparse.Namespace) -> None:
    import triton  # noqa: F401  inductor needs it

    name = options.models[0]
    cases = {
        "compiled": throughput(options, training(options, name, torch.bfloat16, compiled=True)),
        "eager": throughput(options, training(options, name, torch.bfloat16)),
    }
    report(f"torch.compile, {name}, bf16", interleaved(cases, options.rounds), "img/s", "compiled")


def stages(options: argparse.Namespace) -> None:
    """Measures the engine's overhead over a plain loop on one rank, for each ZeRO stage."""
    from benchmarks.engine import engine_step
    from pipeline.train.process_group import process_group

    name, batch = options.models[0], options.batch
    with (
        tempfile.TemporaryDirectory() as folder,
        process_group(Path(folder, "store"), backend=BACKENDS[options.device]),
    ):
        values: dict[str, list[float]] = {}
        for stage in (0, 1, 2, 3):
            engine, config = create_engine(options, 1, stage)
            images_NCHW, labels_N = images(options)

            def step(engine: Any = engine, config: Any = config, x: Any = images_NCHW, labels: Any = labels_N) -> None:
                engine_step(engine, config, x, labels)

            plain = throughput(options, training(options, name, torch.bfloat16))
            ours = f"engine, ZeRO {stage}"
            values = interleaved({ours: throughput(options, step), PLAIN_LOOP: plain}, options.rounds)
            report(f"training step, {name}, batch {batch}, ZeRO {stage}, bf16", values, "img/s", ours)
            del engine
            torch.cuda.empty_cache()


def create_engine(options: argparse.Namespace, workers: int, stage: int) -> tuple[Any, Any]:
    from pipeline.config import RunConfig
    from pipeline.derived import derive
    from pipeline.model.densenet import create
    from pipeline.train.engine import Engine

    name, batch = options.models[0], options.batch
    tree = {
        "model": {"name": name},
        "train": {"epochs": 1, "global_batch_size": batch * workers, "max_device_batch_size": batch},
        "engine": {"zero_stage": stage},
    }
    config = RunConfig.model_validate(tree)
    sizes = {"train_samples": 1000 * batch * workers, "val_samples": 1, "num_classes": CLASSES}
    derived = derive(config, workers=workers, cpus_per_worker=1, device=options.device, **sizes)
    device = torch.device(options.device, torch.cuda.current_device() if options.device == "cuda" else None)
    return Engine(config, derived, create(name, CLASSES), device), config


def create_loader(options: argparse.Namespace, root: Path, device: str) -> tuple[Any, Callable[[], Iterator[Any]]]:
    """Returns a loader of `steps` x `batch` JPEGs, and a function that iterates over them once."""
    from benchmarks.loader import MEAN, STD, write_class_folders
    from pipeline.data.dali import Loader
    from pipeline.data.dataset import open_splits
    from pipeline.data.plan import TrainPlan, micro_batch

    folder = root / "set"
    if not folder.exists():
        write_class_folders(load_images(options.images, root), folder, max(8, options.steps * options.batch))
    index, _ = open_splits(str(folder), "train", "val", root)
    plan = TrainPlan(0, index.widths_N, index.heights_N, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    cores = len(os.sched_getaffinity(0))
    loader = Loader(
        index,
        device=device,  # type: ignore[arg-type]
        device_id=0 if device == "cuda" else None,
        threads=cores,
        max_batch_size=options.batch,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
    )

    def epoch() -> Iterator[Any]:
        steps = range(options.steps)
        return loader.run(plan.batch(micro_batch(s, 0, 0, 1, options.batch, 1), options.side) for s in steps)

    return loader, epoch


def loader_throughput(epoch: Callable[[], Iterator[Any]], options: argparse.Namespace) -> Callable[[], float]:
    def measured() -> float:
        def run() -> None:
            for _ in epoch():
                pass
            synchronize()

        return options.steps * options.batch / seconds(run)

    return measured


def decode(options: argparse.Namespace) -> None:
    from benchmarks.loader import torchvision_loader

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        gpu_loader, gpu_epoch = create_loader(options, root, options.device)
        cpu_loader, cpu_epoch = create_loader(options, root, "cpu")
        torchvision = torchvision_loader(root / "set" / "train", options.batch)
        cases = {
            "DALI, decoded on the GPU": loader_throughput(gpu_epoch, options),
            "DALI, decoded on the CPU": loader_throughput(cpu_epoch, options),
            "torchvision": loader_throughput(lambda: iter(torchvision), options),
        }
        report("loader on a GPU machine", interleaved(cases, options.rounds), "img/s", "DALI, decoded on the GPU")
        gpu_loader.close()
        cpu_loader.close()


def feed(options: argparse.Namespace) -> None:
    """Compares the throughput of the loader alone with that of the model alone."""
    name = options.models[0]
    with tempfile.TemporaryDirectory() as folder:
        loader, epoch = create_loader(options, Path(folder), options.device)
        cases = {
            "loader alone": loader_throughput(epoch, options),
            f"{name} alone": throughput(options, training(options, name, torch.bfloat16)),
        }
        report(f"loader and model, {name}, bf16", interleaved(cases, options.rounds), "img/s", "loader alone")
        loader.close()


def nccl(options: argparse.Namespace) -> None:
    """Compares two ranks with a GPU each and one, with the same batch per GPU."""
    import deepspeed  # noqa: F401  if it is missing, fail here rather than in each rank
    import torch.multiprocessing as mp

    import benchmarks.engine  # noqa: F401

    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(2):
        for workers in speeds:
            folder = Path(tempfile.mkdtemp())
            mp.start_processes(_rank, (workers, folder, options), workers, start_method="spawn")
            speeds[workers].append(float((folder / "speed").read_text()))
    values = {"two GPUs": speeds[2], "one GPU": speeds[1]}
    report(f"NCCL, {options.models[0]}, batch {options.batch} per GPU, bf16", values, "img/s", "two GPUs")


def _rank(rank: int, workers: int, folder: Path, options: argparse.Namespace) -> None:
    from benchmarks.engine import engine_step
    from pipeline.train.process_group import process_group

    if options.device == "cuda":
        torch.cuda.set_device(rank)
    with process_group(folder / "store", rank, workers, backend=BACKENDS[options.device]):
        engine, config = create_engine(options, workers, 1)
        images_NCHW, labels_N = images(options)
        measured = throughput(
            options, lambda: engine_step(engine, config, images_NCHW, labels_N), options.batch * workers
        )
        measured()
        img_per_s = measured()
        if rank == 0:
            (folder / "speed").write_text(str(img_per_s))


CASES: dict[str, Callable[[argparse.Namespace], None]] = {
    "decode": decode,
    "precision": precision,
    "memory": memory,
    "compile": compiled,
    "stages": stages,
    "feed": feed,
    "nccl": nccl,
}


if __name__ == "__main__":
    sys.exit(main())
