"""The whole trainer against a plain PyTorch training loop, step by step, on the same batches."""

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from pipeline.config_file import load_config
from pipeline.data.dali import Loader
from pipeline.data.dataset import open_splits
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import TrainPlan
from pipeline.derived import derive
from pipeline.train.events import Event, Step
from tests.train.settings import new_trainer

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "cifar.yaml"
STEPS = 15
OVERRIDES = [
    "model.name=densenet_bc_l22_k12",
    "engine.zero_stage=0",
    "train.global_batch_size=16",
    "train.log_every_steps=1",
    "schedule.name=cosine",
    "schedule.warmup_epochs=1",
    "data.readers=0",
]


def reference(train_index: DatasetIndex, epochs: float) -> list[float]:
    """Returns the losses of a plain loop: timm's model, torch's SGD, cosine schedule after one epoch of warmup."""
    torch.manual_seed(0)
    model = timm.create_model("densenet_bc_l22_k12", num_classes=len(train_index.classes)).train()
    decayed = [p for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for p in [m.weight]]
    others = [p for p in model.parameters() if not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    plan = TrainPlan(0, train_index.widths_N, train_index.heights_N, (0.6, 1.0), (0.8, 1.25), 0.5)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    options = {"device": "cpu", "device_id": None, "threads": 1, "interpolation": "bilinear", "mean": mean, "std": std}
    warmup, total = len(train_index) / 16, math.ceil(epochs * len(train_index) / 16)
    losses = []
    with Loader(train_index, max_batch_size=16, **options) as loader:
        planned = (plan.batch(torch.arange(16 * step, 16 * (step + 1)).numpy(), 32) for step in range(STEPS))
        for step, batch in enumerate(loader.run(planned)):
            lr_scale = min(1.0, (step + 1) / warmup)
            if step >= warmup:
                lr_scale = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * lr_scale
            loss = F.cross_entropy(model(batch.images_NCHW), batch.labels_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def trained(train_index: DatasetIndex, val_index: DatasetIndex, epochs: float, run_dir: Path) -> list[float]:
    """Returns the losses of the trainer."""
    config = load_config(RECIPE, *OVERRIDES, f"train.epochs={epochs}")
    sizes = {"train_samples": len(train_index), "val_samples": len(val_index), "num_classes": len(train_index.classes)}
    derived = derive(config, workers=1, cpus_per_worker=1, device="cpu", **sizes)
    derived = derived.model_copy(update={"total_steps": STEPS})
    events: list[Event] = []
    new_trainer(config, derived, (train_index, val_index), run_dir, events.append).fit()
    return [event.loss for event in events if isinstance(event, Step)]


@pytest.mark.slow
def test_losses_equal_a_plain_loops(one_rank, indexes, tmp_path):
    train_index, val_index = indexes(train=160)
    ours = trained(train_index, val_index, 4.0, tmp_path)
    assert ours == pytest.approx(reference(train_index, 4.0), rel=1e-5)
    assert len(ours) == STEPS and ours[-1] < ours[0]


@pytest.mark.slow
def test_losses_equal_a_plain_loops_on_photographs(one_rank, cifar10, tmp_path):
    train_index, val_index = open_splits(str(cifar10), "train", "val", tmp_path / "cache")
    ours = trained(train_index, val_index, 1.5, tmp_path)
    assert ours == pytest.approx(reference(train_index, 1.5), rel=1e-5)
