"""End-to-end training and evaluation speed from image files, compared with torchvision's and timm's loaders.

    python -m benchmarks.end_to_end [--images FOLDER] [--model densenet_tiny] [--rounds 5]

All cases train (with SGD) or evaluate the same model on the same JPEGs at 224 pixels in one process. The model is small
so that the loaders matter on a CPU.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.common import interleaved, load_images, report
from benchmarks.engine import CPU, engine_step
from benchmarks.loader import write_class_folders
from benchmarks.loader_peers import MEAN, STD, timm_loader, torchvision_loader
from pipeline.config import RunConfig
from pipeline.data.dali import Loader
from pipeline.data.dataset import open_splits
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import EvalPlan, TrainPlan, micro_batch
from pipeline.derived import derive
from pipeline.model.densenet import create
from pipeline.train.engine import Engine
from pipeline.train.evaluate import evaluate
from pipeline.train.optim import create_optimizer, parameter_groups
from pipeline.train.process_group import process_group

BATCH, IMAGES, SIDE, CLASSES = 32, 512, 224, 8
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Measures training, then evaluation."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path)
    parser.add_argument("--model", default="densenet_tiny")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, process_group(Path(folder, "store")):
        root = Path(folder, "set")
        write_class_folders(load_images(options.images, Path(folder)), root, IMAGES)
        index, _ = open_splits(str(root), "train", "val", Path(folder))
        name = options.model
        training = {
            "this project": our_training(index, name),
            "torchvision's loader, plain loop": plain_training(torchvision_loader(root / "train", BATCH), name),
            "timm's loader, plain loop": plain_training(timm_loader(root / "train", BATCH), name),
        }
        report(f"training from files, {name}", interleaved(training, options.rounds), "img/s", "this project")
        evaluation = {
            "this project": our_evaluation(index, name),
            "torchvision's loader, plain loop": plain_evaluation(root / "train", name),
        }
        report(f"evaluation from files, {name}", interleaved(evaluation, options.rounds), "img/s", "this project")


def create_loader(index: DatasetIndex) -> Loader:
    threads = {"threads": CORES, "readers": 4, "max_batch_size": BATCH}
    return Loader(index, device="cpu", device_id=None, interpolation="bilinear", mean=MEAN, std=STD, **threads)


def our_training(index: DatasetIndex, name: str) -> Callable[[], float]:
    config = RunConfig.model_validate(
        {"model": {"name": name}, "train": {"epochs": 1, "global_batch_size": BATCH}, "engine": {"zero_stage": 0}}
    )
    sizes = {"train_samples": IMAGES, "val_samples": 1, "num_classes": CLASSES}
    derived = derive(config, workers=1, cpus_per_worker=CORES, device="cpu", **sizes)
    engine = Engine(config, derived, create(name, CLASSES), CPU)
    plan = TrainPlan(0, index.widths_N, index.heights_N, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    loader = create_loader(index)

    def epoch() -> None:
        steps = range(IMAGES // BATCH)
        for batch in loader.run(plan.batch(micro_batch(step, 0, 0, 1, BATCH, 1), SIDE) for step in steps):
            engine_step(engine, config, batch.images_NCHW, batch.labels_N)

    return throughput(epoch)


def throughput(epoch: Callable[[], None]) -> Callable[[], float]:
    """Returns a function that measures images per second over one epoch."""

    def measured() -> float:
        started = time.perf_counter()
        epoch()
        return IMAGES / (time.perf_counter() - started)

    return measured


def plain_training(loader: Iterable[tuple[torch.Tensor, torch.Tensor]], name: str) -> Callable[[], float]:
    """A plain PyTorch training loop."""
    model: nn.Module = create(name, CLASSES).train()
    config = RunConfig()
    optimizer = create_optimizer(parameter_groups(model, config.optim.weight_decay), config.optim)

    def epoch() -> None:
        for images_NCHW, labels_N in loader:
            loss = F.cross_entropy(model(images_NCHW), labels_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return throughput(epoch)


def our_evaluation(index: DatasetIndex, name: str) -> Callable[[], float]:
    model, loader = create(name, CLASSES).eval(), create_loader(index)
    plan = EvalPlan(index.widths_N, index.heights_N, 256, SIDE)

    def epoch() -> None:
        with torch.inference_mode():
            evaluate(model, loader, plan, BATCH, CLASSES, forward_is_collective=False)

    return throughput(epoch)


def plain_evaluation(split: Path, name: str) -> Callable[[], float]:
    normalize = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    transform = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(SIDE), *normalize])
    dataset = ImageFolder(str(split), transform)
    loader = DataLoader(dataset, BATCH, num_workers=CORES, persistent_workers=True)
    model = create(name, CLASSES).eval()

    def epoch() -> None:
        with torch.inference_mode():
            for images_NCHW, labels_N in loader:
                model(images_NCHW).topk(5).indices.eq(labels_N[:, None]).sum()

    return throughput(epoch)


if __name__ == "__main__":
    main()
