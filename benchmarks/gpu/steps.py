"""The measurements of `benchmarks.gpu`; each runs in its own process.

    python -m benchmarks.gpu.steps STEP --output FOLDER [--images FOLDER] [--cifar FOLDER] [--tiny]

This project is compared with timm's models in a plain PyTorch loop: autocast, channels last, the same optimizer and the
same cuDNN flags.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import pipeline
from benchmarks import common
from benchmarks.common import interleaved, load_images, output_of, report, save_result, seconds
from pipeline.config import Device, Model, Precision

CLASSES = 1000
MODELS = {"densenet121": 256, "densenet169": 256, "densenet201": 192, "densenet264": 128}  # images per batch
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CIFAR_SECONDS = 120
LEARNING_RATE = 0.1  # of `benchmarks.engine.engine_step`
PLAIN_LOOP = "plain PyTorch loop"
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Context:
    """A step's options: where results go, the data, and the sizes that follow from `tiny`."""

    step: str
    output: Path
    images: Path | None
    cifar: Path | None
    tiny: bool

    @property
    def device(self) -> Device:
        """The device to measure."""
        return "cpu" if self.tiny else "cuda"

    @property
    def torch_device(self) -> torch.device:
        """The same as torch's device."""
        return torch.device("cpu") if self.tiny else torch.device("cuda", 0)

    @property
    def models(self) -> dict[str, int]:
        """Models with their batch sizes."""
        return {"densenet_tiny": 4} if self.tiny else MODELS

    @property
    def model(self) -> tuple[str, int]:
        """The model of measurements that use one, with its batch size."""
        return next(iter(self.models.items()))

    @property
    def side(self) -> int:
        """Image size in pixels."""
        return 32 if self.tiny else 224

    @property
    def rounds(self) -> int:
        """Timed rounds."""
        return 1 if self.tiny else 3

    @property
    def steps(self) -> int:
        """Training steps in a round."""
        return 1 if self.tiny else 6

    def record(self, **values: Any) -> None:
        """Appends a line to results.jsonl."""
        line = json.dumps({"step": self.step} | values, default=str)
        with (self.output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        print(line, flush=True)

    def title(self, benchmark: str) -> str:
        """Returns a benchmark's name in the results."""
        return f"{'Tiny' if self.tiny else 'GPU'}: {benchmark}"

    def save(self, benchmark: str, case: str, value: float, unit: str) -> None:
        """Saves a value that is compared with nothing."""
        self.record(benchmark=self.title(benchmark), case=case, value=value, unit=unit)
        save_result(self.title(benchmark), case, value, unit)

    def compare(self, benchmark: str, values: dict[str, list[float]], unit: str, ours: str) -> None:
        """Saves the rounds of each case, and the ratios of `ours` to them."""
        self.record(benchmark=self.title(benchmark), values=values, unit=unit)
        report(self.title(benchmark), values, unit, ours)

    def batch(self, size: int, side: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the same random images and labels each time."""
        generator = torch.Generator().manual_seed(2)
        images_NCHW = torch.randn(size, 3, *2 * (side or self.side,), generator=generator)
        labels_N = torch.randint(0, CLASSES, (size,), generator=generator)
        return images_NCHW.to(self.torch_device), labels_N.to(self.torch_device)

    @contextmanager
    def process_group(self) -> Iterator[None]:
        """Joins a process group of one rank."""
        from pipeline.train.process_group import process_group

        backend = "gloo" if self.tiny else "nccl"
        with tempfile.TemporaryDirectory() as folder, process_group(Path(folder, "store"), backend=backend):
            yield


def synchronize() -> None:
    """Waits for the GPU's queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def throughput(context: Context, batch: int, step: Callable[[], object]) -> Callable[[], float]:
    """Returns a function that measures images per second over the steps of a round."""

    def run() -> None:
        for _ in range(context.steps):
            step()
        synchronize()

    def measured() -> float:
        synchronize()
        return context.steps * batch / seconds(run)

    return measured


def first_step(create: Callable[[], Step]) -> tuple[Step, float]:
    """Creates a training step and runs it once; returns it with its peak memory in MB, 0 on the CPU."""
    if not torch.cuda.is_available():
        step = create()
        step()
        return step, 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = create()
    step()
    return step, (torch.cuda.max_memory_allocated() - before) / 1e6


def plain_loop(
    context: Context,
    name: str,
    precision: str,
    images_NCHW: torch.Tensor,
    labels_N: torch.Tensor,
    memory: str = "none",
    compiled: bool = False,
) -> Step:
    """Returns a training step of timm's model; `memory` is one of this project's memory modes."""
    from pipeline.config import Optim
    from pipeline.model.densenet import create
    from pipeline.train.optim import create_optimizer, parameter_groups

    torch.manual_seed(1)
    model: Any = create(Model(name=name, memory=memory), CLASSES)  # type: ignore[arg-type]
    model = model.to(context.torch_device).to(memory_format=torch.channels_last)
    images_NCHW = images_NCHW.to(memory_format=torch.channels_last)
    optim = Optim()
    optimizer = create_optimizer(parameter_groups(model, optim.weight_decay), optim)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    forward = torch.compile(model) if compiled else model
    dtype, scaler = DTYPES.get(precision), torch.amp.GradScaler(context.device, enabled=precision == "fp16")

    def step() -> torch.Tensor:
        with torch.autocast(context.device, dtype or torch.bfloat16, enabled=dtype is not None):
            logits_NK = forward(images_NCHW)
        loss = F.cross_entropy(logits_NK.float(), labels_N)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


class EngineLoop:
    """A training step of this project's engine."""

    def __init__(
        self, context: Context, name: str, images_NCHW: torch.Tensor, labels_N: torch.Tensor, **sections: dict[str, Any]
    ) -> None:
        from benchmarks.engine import settings
        from pipeline.model.densenet import create
        from pipeline.train.engine import Engine

        sections["train"] = {"precision": "bf16"} | sections.get("train", {})
        sections["data"] = {"image_size": images_NCHW.shape[-1]}
        self.config, derived = settings(name, len(labels_N), 1, 0, context.device, **sections)
        self.batch = images_NCHW, labels_N
        torch.manual_seed(1)
        self.engine = Engine(self.config, derived, create(name, CLASSES), context.torch_device)

    def __call__(self) -> torch.Tensor:
        from benchmarks.engine import engine_step

        return engine_step(self.engine, self.config, *self.batch)

    def close(self) -> None:
        """Frees the engine's memory."""
        self.engine.close()
        del self.engine
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def environment(context: Context) -> None:
    """Records the machine, its packages and torch's defaults."""
    from importlib.metadata import distributions

    context.record(python=sys.version, cores=len(os.sched_getaffinity(0)), memory=output_of("free", "-g"))
    context.record(packages=dict(sorted((d.metadata["Name"], d.version) for d in distributions())))
    query = "name,driver_version,memory.total,clocks.max.sm"
    context.record(gpus=output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines())
    context.record(
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=None if context.tiny else torch.cuda.nccl.version(),
        cudnn_tf32=torch.backends.cudnn.allow_tf32,
        matmul_precision=torch.get_float32_matmul_precision(),
    )


def decode(context: Context) -> None:
    """Compares DALI's mixed decoding with decoding on the CPU: pixels, then throughput next to torchvision's loader."""
    import numpy as np

    from benchmarks.loader import MEAN, STD, torchvision_loader
    from pipeline.data.dali import Loader
    from pipeline.data.dataset import open_splits
    from pipeline.data.plan import EvalPlan, TrainPlan, micro_batch

    batch, batches = (4, 2) if context.tiny else (256, 20)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        index, _ = open_splits(str(image_set(context, Path(folder), 8 * batch)), "train", "val", Path(folder))

        def create_loader(device: Device, mean: tuple = MEAN, std: tuple = STD) -> Loader:
            return Loader(
                index,
                device=device,
                device_id=0 if device == "cuda" else None,
                threads=cores,
                max_batch_size=batch,
                interpolation="bilinear",
                mean=mean,
                std=std,
            )

        planned = EvalPlan(index.widths_N, index.heights_N, 256, 224).batch(np.arange(batch))
        pixels: dict[Device, torch.Tensor] = {}
        for device in (context.device, "cpu"):
            with create_loader(device, (0, 0, 0), (1 / 255, 1 / 255, 1 / 255)) as loader:
                (found,) = loader.run([planned])
            pixels[device] = found.images_NCHW.cpu()
        differences = (pixels[context.device] - pixels["cpu"]).abs()
        context.record(images=batch, largest_difference=differences.max().item())
        title = "mean pixel difference from the CPU, of 255"
        context.save(title, "libjpeg's chroma", differences.mean().item(), "")

        plan = TrainPlan(0, index.widths_N, index.heights_N, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)

        def load(loader: Loader) -> Callable[[], float]:
            def epoch() -> None:
                micro_batches = (micro_batch(step, 0, 0, 1, batch, 1) for step in range(batches))
                for _ in loader.run(plan.batch(positions, 224) for positions in micro_batches):
                    pass
                synchronize()

            return lambda: batch * batches / seconds(epoch)

        torchvision = torchvision_loader(Path(folder, "set", "train"), batch)
        ours = "mixed decode, libjpeg's chroma"
        with create_loader(context.device) as mixed, create_loader("cpu") as cpu:
            cases = {
                ours: load(mixed),
                f"CPU decode, {cores} threads": load(cpu),
                "torchvision": lambda: 8 * batch / seconds(lambda: list(torchvision)),
            }
            context.compare("loader, original JPEGs", interleaved(cases, min(2, context.rounds)), "img/s", ours)


def image_set(context: Context, folder: Path, count: int) -> Path:
    """Writes class folders with copies of the given or synthetic JPEGs."""
    from benchmarks.loader import write_class_folders

    write_class_folders(load_images(context.images, folder), folder / "set", count)
    return folder / "set"


def zero(context: Context) -> None:
    """Compares the losses of each ZeRO stage and precision on one rank with a plain loop; checks batch norm's dtype."""
    from torch.nn.modules.batchnorm import _BatchNorm

    name, _ = context.model
    batch, side, steps = (4, 32, 2) if context.tiny else (32, 96, 6)
    images_NCHW, labels_N = context.batch(batch, side)
    with context.process_group():
        for precision in PRECISIONS:
            plain = plain_loop(context, name, precision, images_NCHW, labels_N)
            expected = [plain().item() for _ in range(steps)]
            for stage in (0, 1, 2, 3) if precision != "fp16" else (0,):  # the config refuses fp16 at other stages
                sections = {"train": {"precision": precision}, "engine": {"zero_stage": stage, "channels_last": True}}
                engine = EngineLoop(context, name, images_NCHW, labels_N, **sections)
                losses = [engine().item() for _ in range(steps)]
                norms = [m for m in engine.engine.module.modules() if isinstance(m, _BatchNorm)]
                tensors = [t for m in norms for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()]
                dtypes = sorted({str(tensor.dtype) for tensor in tensors})
                difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
                context.record(
                    stage=stage, precision=precision, losses=losses, plain_losses=expected, batch_norm_dtypes=dtypes
                )
                benchmark = f"largest loss difference from plain PyTorch, {name}, {steps} steps"
                context.save(benchmark, f"ZeRO {stage}, {precision}", difference, "")
                if dtypes != ["torch.float32"]:
                    raise AssertionError(f"batch norm is in {dtypes} at ZeRO {stage}, {precision}: expected fp32")
                engine.close()


def training_throughput(context: Context) -> None:
    """Measures throughput and peak memory of the four models in the engine and in a plain loop."""
    with context.process_group():
        for name, batch in context.models.items():
            data = context.batch(batch)
            engine, engine_mb = first_step(lambda name=name, data=data: EngineLoop(context, name, *data))  # type: ignore[misc]
            plain, plain_mb = first_step(lambda name=name, data=data: plain_loop(context, name, "bf16", *data))  # type: ignore[misc]
            cases = {"engine": throughput(context, batch, engine), PLAIN_LOOP: throughput(context, batch, plain)}
            title = f"{name}, batch {batch} at {context.side} px, bf16"
            context.compare(f"training step, {title}", interleaved(cases, context.rounds), "img/s", "engine")
            if not context.tiny:
                peaks = {"engine": [engine_mb], PLAIN_LOOP: [plain_mb]}
                context.compare(f"peak memory, {title}", peaks, "MB", "engine")
            engine.close()  # type: ignore[attr-defined]
            del engine, plain, cases


def feed(context: Context) -> None:
    """Compares the trainer fed by DALI with the trainer fed by one batch that is already in memory."""
    from benchmarks.engine import settings
    from pipeline.data.dali import Batch
    from pipeline.data.dataset import open_splits
    from pipeline.derived import derive
    from pipeline.train.events import Event, Step
    from pipeline.train.inputs import Inputs
    from pipeline.train.trainer import Trainer

    class RepeatedBatch(Inputs):
        def batches(self, first_step: int) -> Generator[Batch]:
            with closing(super().batches(first_step)) as batches:
                batch = next(batches)
            while True:
                yield batch

    name, batch = context.model
    every, epochs = (2, 1) if context.tiny else (8, 5)
    values: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, context.process_group():
        indexes = open_splits(str(image_set(context, Path(folder), 8 * batch)), "train", "val", Path(folder))
        train = {"epochs": epochs, "log_every_steps": every, "precision": "bf16"}
        crop = {"crop": context.side, "resize": context.side + 32, "every_epochs": 99}
        sections = {"train": train, "data": {"image_size": context.side}, "eval": crop}
        config, _ = settings(name, batch, 1, 0, context.device, **sections)
        sizes = {"train_samples": len(indexes[0]), "val_samples": len(indexes[1]), "num_classes": 8}
        cores = len(os.sched_getaffinity(0))
        derived = derive(config, workers=1, cpus_per_worker=cores, device=context.device, **sizes)
        for case, kind in {"JPEGs decoded by DALI": Inputs, "one repeated batch": RepeatedBatch}.items():
            events: list[Event] = []
            inputs, run_dir = kind(config, derived, *indexes, context.torch_device), Path(folder, case)
            device = context.torch_device
            Trainer(config, derived, inputs, run_dir=run_dir, device=device, report=events.append).fit()
            steps = [event for event in events if isinstance(event, Step)]
            context.record(case=case, steps=[vars(step) for step in steps])
            values[case] = [step.img_per_s for step in steps[-context.rounds :]]
    context.compare(f"training, {name}, batch {batch}, bf16", values, "img/s", "JPEGs decoded by DALI")


def resume(context: Context) -> None:
    """Kills a run after its first checkpoint, resumes it, and compares it bit for bit with an uninterrupted run."""
    from safetensors.torch import load_file

    from pipeline.train.checkpoint import checkpoint_root, checkpoints
    from pipeline.train.events import Event, Resumed

    with tempfile.TemporaryDirectory() as folder:
        root = image_set(context, Path(folder), 64)

        def tree(name: str) -> dict[str, Any]:
            return {
                "run": {"name": name, "output": folder, "seed": 5},
                "data": {"root": str(root), "image_size": 32},
                "eval": {"resize": 32, "crop": 32},
                "model": {"name": context.model[0], "drop_rate": 0.2},
                "train": {"epochs": 1.5, "global_batch_size": 8, "precision": "bf16"},
                "checkpoint": {"every_samples": 24, "keep_last": 9},
                "ema": {"decay": 0.9},
            }

        pipeline.fit(pipeline.RunConfig.model_validate(tree("whole")), report=lambda event: None)
        child = mp.get_context("spawn").Process(target=_killed_run, args=(tree("killed"),))
        child.start()
        child.join()
        events: list[Event] = []
        pipeline.fit(pipeline.RunConfig.model_validate(tree("killed")), report=events.append)
        resumed = [event.samples_seen for event in events if isinstance(event, Resumed)]
        whole, killed = (checkpoints(checkpoint_root(Path(folder, name)))[-1] for name in ("whole", "killed"))
        unequal = []
        for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            expected, found = load_file(whole / file), load_file(killed / file)
            unequal += [f"{file}: {key}" for key, value in expected.items() if not torch.equal(value, found[key])]
    context.record(exit_code=child.exitcode, resumed_at=resumed, checkpoint=killed.name, unequal=unequal)
    if child.exitcode != -signal.SIGKILL or not resumed or unequal or whole.name != killed.name:
        raise AssertionError("the run was not killed, did not resume or ended with other weights: see results.jsonl")


def _killed_run(tree: dict[str, Any]) -> None:
    """Trains in a process that kills itself once the first checkpoint is committed."""
    from pipeline.train.events import Event, Saved

    def on_event(event: Event) -> None:
        if isinstance(event, Saved):
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.fit(pipeline.RunConfig.model_validate(tree), report=on_event)


def cifar(context: Context) -> None:
    """Trains DenseNet-BC (L=100, k=12) on CIFAR-10 for two minutes, with as many epochs as fit; accuracy by epoch."""
    from pipeline.train.events import Evaluated, Event, Step

    if context.cifar is None:
        raise FileNotFoundError("no CIFAR-10: give its folder, CIFAR=FOLDER with `make`")
    started = time.monotonic()
    batch, name = (8, "densenet_tiny") if context.tiny else (256, "densenet_bc_l100_k12")

    def train(epochs: float, every_epochs: int) -> tuple[Step, Evaluated]:
        """Returns the last log line and the last evaluation."""
        last: dict[type, Any] = {}

        def on_event(event: Event) -> None:
            last[type(event)] = event
            if isinstance(event, Evaluated):
                rates = {"img_per_s": last[Step].img_per_s, "eval_img_per_s": event.img_per_s}
                context.record(epochs=epochs, epoch=event.epoch, top1=event.result.top1, **rates)

        with tempfile.TemporaryDirectory() as folder:
            config = pipeline.load_config(
                "configs/recipes/cifar.yaml",
                f"model.name={name}",
                f"data.root={context.cifar}",
                f"run.output={folder}",
                f"train.epochs={epochs}",
                f"train.global_batch_size={batch}",
                f"train.max_device_batch_size={batch}",
                "train.log_every_steps=20",
                "optim.lr=0.4",
                "schedule.name=one-cycle",
                "schedule.milestones=[]",
                "eval.batch_size=1000",
                f"eval.every_epochs={every_epochs}",
                "checkpoint.every_epochs=1000",
            )
            pipeline.fit(config, report=on_event)
        return last[Step], last[Evaluated]

    step, evaluation = train(0.0005 if context.tiny else 0.35, 99)
    if context.tiny:
        return
    train_samples = step.samples_seen / step.epoch
    epoch_s = train_samples / step.img_per_s + evaluation.result.total / evaluation.img_per_s / 3
    epochs = max(2, int(0.9 * (CIFAR_SECONDS - (time.monotonic() - started)) / epoch_s))
    step, evaluation = train(epochs, 3)
    title = f"CIFAR-10, {name}, {epochs} epochs, batch {batch}"
    context.save(title, "top-1", evaluation.result.top1, "%")
    context.save(title, "training", step.img_per_s, "img/s")


def train(context: Context) -> None:
    """Runs `densenet train` as a whole, with Ray and MLflow, on the demo's digits."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "configs/demo.yaml", "cluster.workers=1", f"run.output={folder}"]
        command = [sys.executable, "-m", "launch.cli", *words, *["train.epochs=2"] * context.tiny]
        started = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        total_s = time.monotonic() - started
        best = re.findall(r"best +top-1 (\d+/\d+)", done.stdout)
        context.record(exit_code=done.returncode, seconds=total_s, best=best, output=done.stdout[-3000:])
        if done.returncode:
            for log in Path(folder).glob("*/logs/*.log"):
                context.record(log=log.name, end=log.read_text(errors="replace")[-1500:])
            raise AssertionError(f"densenet train ended with exit code {done.returncode}")
        context.save("densenet train, demo", "whole command", total_s, "s")


def memory(context: Context) -> None:
    """Measures throughput and peak memory of the memory modes for the first and the last model."""
    models = context.models
    for name in dict.fromkeys([context.model[0], *list(models)[-1:]]):
        batch, data = models[name], context.batch(models[name])
        cases: dict[str, Callable[[], float]] = {}
        peaks: dict[str, list[float]] = {}
        for mode in ("none", "activation-checkpointing", "shared-stats"):
            step, peak_mb = first_step(lambda mode=mode: plain_loop(context, name, "bf16", *data, mode))  # type: ignore[misc] # noqa: B023
            cases[mode], peaks[mode] = throughput(context, batch, step), [peak_mb]
        values = interleaved(cases, context.rounds)
        for mode in ("activation-checkpointing", "shared-stats"):
            title = f"{name}, model.memory={mode}, batch {batch} at {context.side} px, bf16"
            context.compare(f"training step, {title}", {m: values[m] for m in (mode, "none")}, "img/s", mode)
            if not context.tiny:
                context.compare(f"peak memory, {title}", {m: peaks[m] for m in (mode, "none")}, "MB", mode)
        del cases, step


def switches(context: Context) -> None:
    """Compares the engine's defaults with the other value of each switch."""
    from pipeline.train.engine import set_cuda_flags

    name, batch = context.model
    images_NCHW, labels_N = context.batch(batch)
    title = f"training step, {name}, batch {batch} at {context.side} px"
    fp32 = {"train": {"precision": "fp32"}}
    comparisons: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
        f"{title}, bf16": {
            "engine": {},
            "non-deterministic": {"engine": {"deterministic": False}},
            "ZeRO 1": {"engine": {"zero_stage": 1}},
        },
        f"{title}, fp32": {"TF32": fp32, "no TF32": fp32 | {"engine": {"tf32": False}}},
        f"{title}, bf16, memory format": {"NHWC": {}, "NCHW": {"engine": {"channels_last": False}}},
    }
    with context.process_group():
        for benchmark, variants in comparisons.items():
            engines = {case: EngineLoop(context, name, images_NCHW, labels_N, **s) for case, s in variants.items()}
            rates = {case: throughput(context, batch, engine) for case, engine in engines.items()}

            def measured(case: str, engines: Any = engines, rates: Any = rates) -> float:
                if not context.tiny:
                    set_cuda_flags(engines[case].config)  # they are global, and the last engine's are set
                return rates[case]()

            cases = {case: lambda case=case, measured=measured: measured(case) for case in variants}  # type: ignore[misc]
            context.compare(benchmark, interleaved(cases, context.rounds), "img/s", next(iter(variants)))
            for engine in engines.values():
                engine.close()


def compiled(context: Context) -> None:
    """Measures torch.compile in the engine and in a plain loop: time to compile, throughput, peak memory."""
    name, batch = context.model
    data = context.batch(batch)
    title = f"{name}, batch {batch} at {context.side} px, bf16, torch.compile"
    creations: dict[str, Callable[[], Step]] = {
        "engine": lambda: EngineLoop(context, name, *data, engine={"compile": "on"}),
        PLAIN_LOOP: lambda: plain_loop(context, name, "bf16", *data, compiled=True),
    }
    cases = {}
    with context.process_group():
        for case, create in creations.items():
            started = time.monotonic()
            step, peak_mb = first_step(create)
            synchronize()
            context.save(f"time to the first step, {title}", case, time.monotonic() - started, "s")
            cases[case] = throughput(context, batch, step)
            if not context.tiny:
                context.save(f"peak memory, {title}", case, peak_mb, "MB")
        context.compare(f"training step, {title}", interleaved(cases, context.rounds), "img/s", "engine")


def two_gpus(context: Context) -> None:
    """Compares two ranks with a GPU each and one rank, with the same batch per GPU."""
    name, batch = context.model
    if not context.tiny and torch.cuda.device_count() < 2:
        context.record(skipped="there is one GPU")
        return
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(context.rounds):
        for workers in rates:
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(_rank, (workers, Path(folder), context), workers, start_method="spawn")
                rates[workers].append(float(Path(folder, "img_per_s").read_text()))
    values = {"two GPUs": rates[2], "one GPU": rates[1]}
    context.compare(f"NCCL, {name}, batch {batch} per GPU, bf16", values, "img/s", "two GPUs")


def _rank(rank: int, workers: int, folder: Path, context: Context) -> None:
    from benchmarks.engine import engine_step, settings
    from pipeline.model.densenet import create
    from pipeline.train.engine import Engine
    from pipeline.train.process_group import process_group

    name, batch = context.model
    device = torch.device("cpu") if context.tiny else torch.device("cuda", rank)
    if not context.tiny:
        torch.cuda.set_device(device)
    images_NCHW, labels_N = (tensor.to(device) for tensor in context.batch(batch))
    with process_group(folder / "store", rank, workers, backend="gloo" if context.tiny else "nccl"):
        config, derived = settings(name, batch, workers, 0, context.device, train={"precision": "bf16"})
        engine = Engine(config, derived, create(name, CLASSES), device)
        measured = throughput(context, batch * workers, lambda: engine_step(engine, config, images_NCHW, labels_N))
        measured()
        img_per_s = measured()
        if rank == 0:
            (folder / "img_per_s").write_text(str(img_per_s))


STEPS: dict[str, Callable[[Context], None]] = {
    "environment": environment,
    "decode": decode,
    "zero": zero,
    "throughput": training_throughput,
    "feed": feed,
    "resume": resume,
    "cifar": cifar,
    "train": train,
    "memory": memory,
    "switches": switches,
    "compile": compiled,
    "two_gpus": two_gpus,
}


def main() -> None:
    """Runs one step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no CUDA device")
    warnings.simplefilter("once")
    common.RESULTS = options.output / "results.csv"
    context = Context(options.step, options.output, options.images, options.cifar, options.tiny)
    STEPS[options.step](context)


if __name__ == "__main__":
    main()
