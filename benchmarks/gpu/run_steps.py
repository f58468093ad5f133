"""Steps that decode images or train a run: the loader, the trainer, a killed run, CIFAR-10, `densenet train`."""

import itertools
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import nvidia.dali.types as types
import torch
import torch.multiprocessing as mp
from nvidia.dali import fn
from safetensors.torch import load_file

import pipeline
from benchmarks.common import interleaved, load_images, seconds
from benchmarks.engine import settings
from benchmarks.gpu.context import Context, synchronize
from benchmarks.loader import write_class_folders
from benchmarks.loader_peers import CORES, MEAN, STD, torchvision_loader
from pipeline.config_fields import Device, Rgb
from pipeline.data import dali
from pipeline.data.dali import Batch, Loader
from pipeline.data.dataset import open_splits
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, TrainPlan, micro_batch
from pipeline.derived import Derived, derive
from pipeline.train.checkpoint import checkpoint_root, checkpoints
from pipeline.train.events import Evaluated, Event, Resumed, Saved, Step
from pipeline.train.inputs import Inputs
from pipeline.train.trainer import Trainer

CIFAR_SECONDS = 120
FED = "JPEGs decoded by DALI"


def decode(context: Context) -> None:
    """Compares DALI's mixed decoding with decoding on the CPU: pixels, then throughput next to torchvision's loader."""
    batch, batches = (4, 2) if context.tiny else (256, 20)
    with tempfile.TemporaryDirectory() as folder:
        index, _ = open_splits(str(image_set(context, Path(folder), 8 * batch)), "train", "val", Path(folder))
        differences = pixel_differences(index, batch, context.device)
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
        with new_loader(index, context.device, batch) as mixed, new_loader(index, "cpu", batch) as cpu:
            cases = {
                ours: load(mixed),
                f"CPU decode, {CORES} threads": load(cpu),
                "torchvision": lambda: 8 * batch / seconds(lambda: list(torchvision)),
            }
            context.compare("loader, original JPEGs", interleaved(cases, min(2, context.rounds)), "img/s", ours)
        for whole, hardware_load in itertools.product((False, True), (0.0, 0.65, 1.0)):
            how = "whole images, then slices" if whole else "slices"
            decoded = partial(_decoded, whole=whole, hardware_load=hardware_load)
            with mock.patch.object(dali, "_decoded", decoded), new_loader(index, context.device, batch) as loader:
                img_per_s = max(load(loader)() for _ in range(2))
            context.save("mixed decode", f"{how}, hw_decoder_load {hardware_load}", img_per_s, "img/s")


def _decoded(encoded: Any, start: Any, shape: Any, decoder: str, whole: bool, hardware_load: float) -> Any:
    """Decodes windows as `pipeline.data.dali` does; `whole`: decodes the image, which the hardware decoder supports."""
    options = {"output_type": types.RGB, "adjust_orientation": False, "use_fast_idct": False}
    options |= {"jpeg_fancy_upsampling": True, "hw_decoder_load": hardware_load, "device": decoder}
    if whole:
        return fn.slice(fn.decoders.image(encoded, **options), start=start, shape=shape, axis_names="HW")
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", **options)


def pixel_differences(index: DatasetIndex, count: int, device: Device) -> torch.Tensor:
    """Returns the absolute differences of the first images' pixels (0 to 255) on a device from those on the CPU."""
    planned = EvalPlan(index.widths_N, index.heights_N, 256, 224).batch(np.arange(count))
    found = []
    for where in (device, "cpu"):
        with new_loader(index, where, count, (0, 0, 0), (1 / 255, 1 / 255, 1 / 255)) as loader:
            (batch,) = loader.run([planned])
        assert batch.images_NCHW.device.type == batch.labels_N.device.type == where
        found.append(batch.images_NCHW.cpu())
    return (found[0] - found[1]).abs()


def new_loader(index: DatasetIndex, device: Device, batch: int, mean: Rgb = MEAN, std: Rgb = STD) -> Loader:
    return Loader(
        index,
        device=device,
        device_id=0 if device == "cuda" else None,
        threads=CORES,
        max_batch_size=batch,
        interpolation="bilinear",
        mean=mean,
        std=std,
    )


def image_set(context: Context, folder: Path, count: int) -> Path:
    """Writes class folders with copies of the given or synthetic JPEGs."""
    write_class_folders(load_images(context.images, folder), folder / "set", count)
    return folder / "set"


class TimedInputs(Inputs):
    """Counts the time of the thread that trains, between two batches: `host_s`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.host_s: list[float] = []

    def batches(self, first_step: int) -> Generator[Batch]:
        with closing(self._batches(first_step)) as batches:
            for batch in batches:
                started = time.thread_time()
                yield batch
                self.host_s.append(time.thread_time() - started)

    def _batches(self, first_step: int) -> Generator[Batch]:
        return super().batches(first_step)


class RepeatedBatch(TimedInputs):
    """Repeats the first batch, which is in memory; for each, a thread takes a batch from `loading`, if given."""

    def __init__(self, *args: Any, loading: Inputs | None = None) -> None:
        super().__init__(*args)
        self._loading = loading

    def _batches(self, first_step: int) -> Generator[Batch]:
        with closing(super()._batches(first_step)) as batches:
            batch = next(batches)
        if self._loading is None:
            yield from itertools.repeat(batch)
            return
        steps: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # so that the thread is not faster than the trainer

        def load(inputs: Inputs) -> None:
            with closing(inputs), closing(inputs.batches(0)) as batches:
                for _ in zip(iter(steps.get, None), batches, strict=False):
                    pass

        with ThreadPoolExecutor(1) as pool:
            pool.submit(load, self._loading)
            try:
                for step in itertools.count():
                    steps.put(step)
                    yield batch
            finally:
                steps.put(None)


def feed(context: Context) -> None:
    """Compares the trainer fed by DALI with one batch in memory, and finds what slows the former down.

    With one batch in memory, a loader runs in another thread: on the GPU, it takes time of the GPU and of Python's
    interpreter lock; on the CPU, of the lock and the cores. `host_s` of a step is the training thread's CPU time.
    """
    name, batch = context.model
    every, epochs = (2, 1) if context.tiny else (8, 5)
    device, cpu = context.torch_device, torch.device("cpu")
    values: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, context.process_group():
        indexes = open_splits(str(image_set(context, Path(folder), 8 * batch)), "train", "val", Path(folder))
        train = {"epochs": epochs, "log_every_steps": every, "precision": "bf16"}
        crop = {"crop": context.side, "resize": context.side + 32, "every_epochs": 99}
        sections = {"train": train, "data": {"image_size": context.side}, "eval": crop}
        config, _ = settings(name, batch, 1, 0, context.device, **sections)
        sizes = {"train_samples": len(indexes[0]), "val_samples": len(indexes[1]), "num_classes": 8}
        derived = derive(config, workers=1, cpus_per_worker=CORES, device=context.device, **sizes)
        on_cpu = derived.model_copy(update={"device": "cpu"})

        def with_loader(where: Derived, device: torch.device) -> RepeatedBatch:
            return RepeatedBatch(*arguments, loading=Inputs(config, where, *indexes, device))

        arguments = (config, derived, *indexes, device)
        kinds: dict[str, Callable[[], TimedInputs]] = {
            FED: lambda: TimedInputs(*arguments),
            "one repeated batch": lambda: RepeatedBatch(*arguments),
            "one repeated batch, loader in a thread": lambda: with_loader(derived, device),
            "one repeated batch, CPU loader in a thread": lambda: with_loader(on_cpu, cpu),
        }
        for case, create in kinds.items():
            events: list[Event] = []
            inputs = create()
            Trainer(config, derived, inputs, run_dir=Path(folder, case), device=device, report=events.append).fit()
            steps = [event for event in events if isinstance(event, Step)]
            context.record(case=case, steps=[vars(step) for step in steps], host_s=inputs.host_s)
            context.save(f"CPU time of the training thread, {name}", case, statistics.median(inputs.host_s), "s")
            values[case] = [step.img_per_s for step in steps[-context.rounds :]]
        with closing(Inputs(*arguments)) as alone, closing(alone.batches(0)) as batches:
            next(batches)  # warm-up
            started = time.perf_counter()
            images = sum(len(batch.labels_N) for batch in batches)
            synchronize()
        context.save("loader alone", context.device, images / (time.perf_counter() - started), "img/s")
    context.compare(f"training, {name}, batch {batch}, bf16", values, "img/s", FED)


def resume(context: Context) -> None:
    """Kills a run after its first checkpoint, resumes it, and compares it bit for bit with an uninterrupted run."""
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

    def on_event(event: Event) -> None:
        if isinstance(event, Saved):
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.fit(pipeline.RunConfig.model_validate(tree), report=on_event)


def cifar(context: Context) -> None:
    """Trains DenseNet-BC (L=100, k=12) on CIFAR-10 for two minutes, with as many epochs as fit; accuracy by epoch."""
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

    step, evaluation = train(0.005 if context.tiny else 0.35, 99)
    train_samples = step.samples_seen / step.epoch
    epoch_s = train_samples / step.img_per_s + evaluation.result.total / evaluation.img_per_s / 3
    affordable = max(2, int(0.9 * (CIFAR_SECONDS - (time.monotonic() - started)) / epoch_s))
    epochs = 0.01 if context.tiny else affordable
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
