"""Steps that train on images in memory: precision and ZeRO, throughput, memory, switches, torch.compile, two GPUs.

The peer is timm's model in a plain PyTorch loop: autocast, channels last, the same optimizer and cuDNN flags.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.common import interleaved
from benchmarks.engine import PLAIN_LOOP, engine_step, settings
from benchmarks.gpu.context import CLASSES, Context, Step, first_step, synchronize, throughput
from pipeline.config import Model, RunConfig
from pipeline.config_fields import MemoryMode, Precision
from pipeline.config_train import Optim
from pipeline.model.densenet import create
from pipeline.train.engine import Engine, set_cuda_flags
from pipeline.train.optim import create_optimizer, parameter_groups
from pipeline.train.process_group import process_group

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEARNING_RATE = 0.1  # of `engine_step`


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
    if not context.tiny:
        set_cuda_flags(RunConfig())
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

        sections["train"] = {"precision": "bf16"} | sections.get("train", {})
        sections["data"] = {"image_size": images_NCHW.shape[-1]}
        self.config, derived = settings(name, len(labels_N), 1, 0, context.device, **sections)
        self.batch = images_NCHW, labels_N
        torch.manual_seed(1)
        self.engine = Engine(self.config, derived, create(name, CLASSES), context.torch_device)

    def __call__(self) -> torch.Tensor:

        return engine_step(self.engine, self.config, *self.batch)

    def close(self) -> None:
        """Frees the engine's memory."""
        self.engine.close()
        del self.engine
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def zero(context: Context) -> None:
    """Compares the losses of each ZeRO stage and precision on one rank with a plain loop; checks batch norm's dtype."""
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


def memory(context: Context) -> None:
    """Measures throughput and peak memory of the memory modes for the first and the last model."""
    models = context.models
    for name in dict.fromkeys([context.model[0], *list(models)[-1:]]):
        batch, data = models[name], context.batch(models[name])
        cases: dict[str, Callable[[], float]] = {}
        peaks: dict[str, list[float]] = {}
        for mode in get_args(MemoryMode):
            step, peak_mb = first_step(lambda mode=mode: plain_loop(context, name, "bf16", *data, mode))  # type: ignore[misc] # noqa: B023
            cases[mode], peaks[mode] = throughput(context, batch, step), [peak_mb]
        values = interleaved(cases, context.rounds)
        for mode in get_args(MemoryMode)[1:]:
            title = f"{name}, model.memory={mode}, batch {batch} at {context.side} px, bf16"
            context.compare(f"training step, {title}", {m: values[m] for m in (mode, "none")}, "img/s", mode)
            if not context.tiny:
                context.compare(f"peak memory, {title}", {m: peaks[m] for m in (mode, "none")}, "MB", mode)
        del cases, step


def switches(context: Context) -> None:
    """Compares the engine's defaults with the other value of each switch."""
    name, batch = context.model
    images_NCHW, labels_N = context.batch(batch)
    title = f"training step, {name}, batch {batch} at {context.side} px"
    fp32 = {"train": {"precision": "fp32"}}
    comparisons: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
        f"{title}, bf16, switches": {
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
