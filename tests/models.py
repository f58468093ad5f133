"""Small models for tests: a folder with a card and weights, and a store to register them in."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models import DenseNet

from pipeline.config import RunConfig
from pipeline.model.architectures import ARCHITECTURES
from pipeline.model.card import ModelCard, Transform
from pipeline.model.densenet import create
from pipeline.tracking.run import Tracker

CLASSES = ("cat", "dog", "eel")
TRANSFORM: dict[str, Any] = {
    "resize": 40,
    "crop": 32,
    "interpolation": "bilinear",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.25],
}


def network(num_classes: int = len(CLASSES), seed: int = 0) -> DenseNet:
    """A small model in evaluation mode, with statistics that are not those of a new one."""
    torch.manual_seed(seed)
    made = create("densenet_tiny", num_classes)
    with torch.no_grad():
        for _ in range(5):
            made(torch.randn(8, 3, 32, 32))
    return made.eval()


def write_model(folder: Path, classes: Sequence[str] = CLASSES, seed: int = 0, **changes: Any) -> Path:
    """Writes `network(len(classes), seed)` as a checkpoint's folder, as far as it is a model."""
    folder.mkdir(parents=True)
    save_file(network(len(classes), seed).state_dict(), folder / "model.safetensors")
    card = ModelCard(
        name="densenet_tiny",
        architecture=ARCHITECTURES["densenet_tiny"],
        num_classes=len(classes),
        classes=tuple(classes),
        weights="model.safetensors",
        transform=Transform(**TRANSFORM),
        metrics={"top1_correct": 3, "top5_correct": 4, "top5_k": 5, "total": 5, "loss": 0.5},
        samples_seen=123,
        epoch=1.5,
        config_hash="abc",
    )
    dataclasses.replace(card, **changes).write(folder)
    return folder


def spoil(folder: Path) -> Path:
    """Makes one weight of such a model NaN, so that all its outputs are NaN."""
    weights = load_file(folder / "model.safetensors")
    weights["features.norm5.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    return folder


def start_run(folder: Path, name: str = "one") -> Tracker:
    """A run in a store of the folder's own.

    Its address is explicit: registering sets MLFLOW_TRACKING_URI, and a fixture of a module comes before each test's
    clean slate.
    """
    store = {"uri": f"sqlite:///{folder}/mlflow.db"}
    config = RunConfig.model_validate({"run": {"output": str(folder), "name": name}, "tracking": store})
    return Tracker(config, folder / name, name, print)
