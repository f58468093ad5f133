"""DeepSpeed engine overhead, data-parallel scaling to two ranks, and the cost of checkpoints and resuming, on the CPU.

python -m benchmarks.engine [--model densenet121] [--batch 8] [--rounds 7]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image

from benchmarks.common import interleaved, machine, report, save_result, seconds
from pipeline.config import RunConfig
from pipeline.config_fields import Device
from pipeline.data.dataset import open_splits
from pipeline.derived import Derived, derive
from pipeline.host_memory import keep_freed_memory
from pipeline.model.densenet import create
from pipeline.train import checkpoint
from pipeline.train.checkpoint import checkpoint_root
from pipeline.train.engine import Engine
from pipeline.train.events import Event, FirstStep, Saved, Step
from pipeline.train.inputs import Inputs
from pipeline.train.loss import Criterion
from pipeline.train.optim import create_optimizer, parameter_groups
from pipeline.train.process_group import process_group
from pipeline.train.trainer import Trainer
from pipeline.train.writer import CheckpointFiles, CheckpointWriter

CPU, CLASSES, SIDE = torch.device("cpu"), 1000, 224
PLAIN_LOOP = "plain PyTorch loop"


def main() -> None:
    """Runs all comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="densenet121")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    name, batch, rounds = options.model, options.batch, options.rounds
    two_ranks(name, batch, rounds)
    with process_group(Path(tempfile.mkdtemp()) / "store"):
        engine_overhead(name, batch, rounds)
        checkpoint_time(name, batch, rounds)
        run_with_checkpoints(name, batch, max(3, rounds // 3))


def settings(
    name: str, batch: int, workers: int, stage: int = 1, device: Device = "cpu", **sections: dict[str, Any]
) -> tuple[RunConfig, Derived]:
    """Returns a config for training steps on images in memory; `sections` has further keys of the config."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"name": name},
        "train": {"epochs": 1, "global_batch_size": batch * workers, "max_device_batch_size": batch},
        "engine": {"zero_stage": stage},
    }
    for section, keys in sections.items():
        tree[section] = tree.get(section, {}) | keys
    config = RunConfig.model_validate(tree)
    sizes = {"train_samples": 1000 * batch * workers, "val_samples": 1, "num_classes": CLASSES}
    return config, derive(config, workers=workers, cpus_per_worker=1, device=device, **sizes)


def images(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, SIDE, SIDE), torch.randint(0, CLASSES, (batch,))


def engine_step(engine: Engine, config: RunConfig, images_NCHW: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Runs one training step like the trainer, and returns the loss."""
    engine.set_learning_rate(0.1)
    loss = Criterion(config.loss, CLASSES)(engine.forward(images_NCHW), labels_N, images_NCHW)
    engine.backward(loss)
    engine.step()
    engine.update_ema(1)
    return loss.detach()


def engine_overhead(name: str, batch: int, rounds: int) -> None:
    """Compares an engine step at ZeRO stages 0 and 1 on one rank with a plain PyTorch loop with the same optimizer."""
    images_NCHW, labels_N = images(batch)
    model = create(name, CLASSES).train()
    config, _ = settings(name, batch, 1)
    optimizer = create_optimizer(parameter_groups(model, config.optim.weight_decay), config.optim)

    def plain_step() -> None:
        loss = F.cross_entropy(model(images_NCHW), labels_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    cases = {PLAIN_LOOP: lambda: seconds(plain_step)}
    for stage in (0, 1):
        config, derived = settings(name, batch, 1, stage)
        engine = Engine(config, derived, create(name, CLASSES), CPU)
        cases[f"engine, ZeRO {stage}"] = lambda e=engine, c=config: seconds(  # type: ignore[misc]
            lambda: engine_step(e, c, images_NCHW, labels_N)
        )
    values = interleaved(cases, rounds)
    for stage in (0, 1):
        ours = f"engine, ZeRO {stage}"
        pair = {ours: values[ours], PLAIN_LOOP: values[PLAIN_LOOP]}
        report(f"training step, {name}, batch {batch} at {SIDE} px, ZeRO {stage}", pair, "s", ours)


def two_ranks(name: str, batch: int, rounds: int) -> None:
    """Compares two ranks with one, and with two runs that share the cores but exchange nothing.

    One thread and `batch` images per rank, at ZeRO stages 0 and 1.
    """
    for stage in (0, 1):
        groups = {"two ranks": (2,), "one rank": (1,), "two runs at the same time": (1, 1)}
        cases = {case: lambda g=group, s=stage: _speed(g, s, name, batch, rounds) for case, group in groups.items()}  # type: ignore[misc]
        benchmark = f"training throughput, {name}, ZeRO {stage}, batch {batch} per rank, one thread per rank"
        report(benchmark, interleaved(cases, max(2, rounds // 3)), "img/s", "two ranks")


def _speed(groups: tuple[int, ...], stage: int, name: str, batch: int, rounds: int) -> float:
    """Returns the images per second of all process groups together; `groups` has their numbers of ranks."""
    folders = [Path(tempfile.mkdtemp()) for _ in groups]
    started = [
        mp.start_processes(
            _rank, (workers, folder, name, batch, rounds, stage), workers, join=False, start_method="spawn"
        )
        for workers, folder in zip(groups, folders, strict=True)
    ]
    for processes in started:
        while not processes.join():
            pass
    return sum(float((folder / "speed").read_text()) for folder in folders)


def _rank(rank: int, workers: int, folder: Path, name: str, batch: int, rounds: int, stage: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as the loader does in a run on CPUs
    with process_group(folder / "store", rank, workers):
        config, derived = settings(name, batch, workers, stage)
        engine = Engine(config, derived, create(name, CLASSES), CPU)
        images_NCHW, labels_N = images(batch)
        engine_step(engine, config, images_NCHW, labels_N)
        dist.barrier()
        started = time.perf_counter()
        for _ in range(rounds):
            engine_step(engine, config, images_NCHW, labels_N)
        dist.barrier()
        if rank == 0:
            speed = rounds * batch * workers / (time.perf_counter() - started)
            (folder / "speed").write_text(str(speed))


def checkpoint_time(name: str, batch: int, rounds: int) -> None:
    """Measures a checkpoint's copy, which blocks training, and its write (files, hashes, rename), which does not."""
    config, derived = settings(name, batch, 1)
    engine = Engine(config, derived, create(name, CLASSES), CPU)
    engine_step(engine, config, *images(batch))
    writes: list[float] = []
    copies: list[float] = []
    root = Path(tempfile.mkdtemp())
    with CheckpointWriter(root, lambda folder, write_s: writes.append(write_s), print) as writer:
        for number in range(rounds):
            started = time.perf_counter()
            tensors = {"model.safetensors": engine.full_state(), "optimizer.safetensors": engine.optimizer_state()}
            copies.append(time.perf_counter() - started)
            contents = CheckpointFiles(tensors, {}, {})
            writer.write(checkpoint.folder_name(number + 1), contents, lambda folders: folders[-1:])
            writer.wait()
    copy, write = statistics.median(copies), statistics.median(writes)
    benchmark = f"checkpoint, {name}"
    print(f"\n{benchmark}: {machine()}, medians of {rounds}: copy {copy:.3f} s (blocks training), write {write:.3f} s")
    save_result(benchmark, "copy, blocks training", copy, "s", rounds=rounds)
    save_result(benchmark, "write, in the background", write, "s", rounds=rounds)


def run_with_checkpoints(model: str, batch: int, rounds: int) -> None:
    """Compares runs with nine checkpoints and without, and the time to the first step of new and resumed runs."""
    folder = Path(tempfile.mkdtemp())
    for number in range(4 * batch):
        for split in ("train", "val"):
            file = folder / "set" / split / f"class{number % 2}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((SIDE + 32, SIDE + 32), 50).convert("RGB").save(file)
    indexes = open_splits(str(folder / "set"), "train", "val", folder)

    def run(case: str, every: int | None, resume: Path | None = None) -> tuple[float, float, float]:
        """Returns the seconds to the first step, of all later steps, and blocked by checkpoints."""
        config = RunConfig.model_validate(
            {
                "model": {"name": model},
                "train": {"epochs": 5, "global_batch_size": batch},
                "eval": {"every_epochs": 99},
                "checkpoint": {"every_epochs": 99, "every_samples": every, "keep_last": 99},
            }
        )
        sizes = {"train_samples": len(indexes[0]), "val_samples": len(indexes[1]), "num_classes": 2}
        derived = derive(config, workers=1, cpus_per_worker=2, device="cpu", **sizes)
        times: dict[type, float] = {}
        begin = time.perf_counter()
        stalls: list[float] = []

        def on_event(event: Event) -> None:
            times[type(event)] = time.perf_counter()
            if isinstance(event, Saved):
                stalls.append(event.stall_s)

        inputs = Inputs(config, derived, *indexes, CPU)
        Trainer(config, derived, inputs, run_dir=folder / case, device=CPU, report=on_event, resume=resume).fit()
        return times[FirstStep] - begin, times[Step] - times[FirstStep], sum(stalls[:-1])

    values: dict[str, list[float]] = {}
    for number in range(rounds):
        start_s, without_s, _ = run(f"without{number}", None)
        _, with_s, blocked_s = run(f"with{number}", 2 * batch)
        second_last = checkpoint.checkpoints(checkpoint_root(folder / f"with{number}"))[-2]
        resume_s, _, _ = run(f"resumed{number}", None, second_last)
        names = ("first step, new run", "no checkpoint", "nine checkpoints", "blocked", "first step, resumed run")
        for name, value in zip(names, (start_s, without_s, with_s, blocked_s, resume_s), strict=True):
            values.setdefault(name, []).append(value)
    benchmark = f"19 steps, {model}, batch {batch} at {SIDE} px"
    report(benchmark, {n: values[n] for n in ("nine checkpoints", "no checkpoint")}, "s", "nine checkpoints")
    fractions = [
        100 * blocked / total for blocked, total in zip(values["blocked"], values["nine checkpoints"], strict=True)
    ]
    save_result(benchmark, "time blocked by nine checkpoints", statistics.median(fractions), "%", rounds=len(fractions))
    resumed = {n: values[n] for n in ("first step, resumed run", "first step, new run")}
    report(f"start to first step, {model}", resumed, "s", "first step, resumed run")


if __name__ == "__main__":
    main()
