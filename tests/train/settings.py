"""A test run's config and derived values for a small image set, and its trainer."""

from pathlib import Path
from typing import Any

import torch

from pipeline.config import RunConfig
from pipeline.config_fields import Device
from pipeline.data.index import DatasetIndex
from pipeline.derived import Derived, derive
from pipeline.train.batch_size_finder import find_batch_size
from pipeline.train.events import Report, Warned
from pipeline.train.inputs import Inputs
from pipeline.train.trainer import Trainer

CPU = torch.device("cpu")


def settings(
    train_index: DatasetIndex, val_index: DatasetIndex, workers: int = 1, device: Device = "cpu", **sections: dict
) -> tuple[RunConfig, Derived]:
    """Returns a config for the image set, and its derived values."""
    tree: dict = {
        "run": {"seed": 5},
        "model": {"name": "densenet_tiny"},
        "data": {"image_size": 32},
        "eval": {"resize": 32, "crop": 32},
        "train": {"epochs": 2, "global_batch_size": 8, "log_every_steps": 2},
        "optim": {"lr": 0.02},
        "schedule": {"name": "cosine"},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    config = RunConfig.model_validate(tree)
    derived = derive(
        config,
        workers=workers,
        cpus_per_worker=1,
        device=device,
        train_samples=len(train_index),
        val_samples=len(val_index),
        num_classes=len(train_index.classes),
    )
    return config, derived


def new_trainer(
    config: RunConfig,
    derived: Derived,
    indexes: tuple[DatasetIndex, DatasetIndex],
    run_dir: Path,
    report: Report,
    **options: Any,
) -> Trainer:
    """Returns this rank's trainer, on the CPU or the first GPU; `options` are further arguments of `Trainer`."""
    device = CPU if derived.device == "cpu" else torch.device("cuda", 0)
    derived = find_batch_size(config, derived, device, lambda text: report(Warned(text)))
    inputs = Inputs(config, derived, *indexes, device)
    return Trainer(config, derived, inputs, run_dir=run_dir, device=device, report=report, **options)
