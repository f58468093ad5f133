"""Optimizers and their parameter groups."""

import pytest
import timm.optim
import torch
import torch.nn.functional as F

from pipeline.config import Finetune, RunConfig
from pipeline.config_train import Optim
from pipeline.model.densenet import create
from pipeline.model.weights import lr_scales
from pipeline.train.engine import Engine
from pipeline.train.optim import create_optimizer, parameter_groups
from tests.train.test_engine import CPU, batches, settings


def test_only_convolution_and_linear_weights_have_weight_decay():
    model = create("densenet121", 10)
    decayed, rest = (sum(p.numel() for p in g["params"]) for g in parameter_groups(model, 1e-4))
    assert decayed + rest == sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters())
    assert rest == norms + model.classifier.bias.numel()


def test_frozen_parameters_are_in_no_group():
    model = create("densenet_tiny", 10)
    model.features.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 1e-4)) == 2


@pytest.mark.parametrize(
    ("optim", "reference"),
    [
        ({"name": "sgd", "lr": 0.1}, lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True)),
        ({"name": "sgd", "lr": 0.1, "nesterov": False}, lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01)),
        ({"name": "adamw", "lr": 0.01}, lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.01)),
        (
            {"name": "lamb", "lr": 0.01},
            lambda p: timm.optim.Lamb(p, 0.01, weight_decay=0.01, eps=1e-8, max_grad_norm=None),
        ),
        (
            {"name": "lars", "lr": 1.0},
            lambda p: timm.optim.Lars(p, 1.0, momentum=0.9, weight_decay=0.01, nesterov=True),
        ),
        (
            {"name": "muon", "lr": 0.01, "momentum": 0.95},
            lambda p: timm.optim.Muon(p, 0.01, 0.01, 0.95, True, eps=1e-8, betas=(0.9, 0.999)),
        ),
    ],
)
def test_optimizers_step_like_the_reference_implementation(optim, reference):
    weights = []
    for ours in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3, bias=False)
        optimizer = reference(layer.parameters())
        if ours:
            optimizer = create_optimizer(parameter_groups(layer, 0.01), Optim(**optim))
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.arange(8.0).reshape(2, 4)).square().mean().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", ["lamb", "lars", "muon"])
def test_lamb_lars_and_muon_train_at_zero_stage_0_and_are_refused_at_stage_1(name, one_rank):
    config, d = settings(0, name=name, lr={"lamb": 0.01, "lars": 5.0, "muon": 0.002}[name])
    torch.manual_seed(0)
    engine = Engine(config, d, create("densenet_tiny", d.num_classes), CPU)
    images_NCHW, labels_N = batches(1)[0]
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(engine.forward(images_NCHW), labels_N)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError, match=f"optim.name={name} computes on whole weight tensors"):
        settings(1, name=name)


def test_layer_decay_and_head_lr_mult_reach_the_optimizer(one_rank):
    config, d = settings(1)
    finetune = Finetune(layer_decay=0.5, head_lr_mult=10)
    config = config.model_copy(update={"finetune": finetune})
    model = create("densenet_tiny", d.num_classes)
    factors = lr_scales(model, finetune)
    assert factors["classifier.weight"] == 10
    assert factors["features.norm5.weight"] == 1
    assert factors["features.denseblock3.denselayer1.conv1.weight"] == 0.5
    assert factors["features.denseblock1.denselayer1.conv1.weight"] == factors["features.transition1.conv.weight"]
    assert factors["features.conv0.weight"] == 0.5**4
    engine = Engine(config, d, model, CPU)
    engine.set_learning_rate(0.1)
    learning_rates = sorted({group["lr"] for group in engine._optimizer.param_groups})
    assert learning_rates == pytest.approx([0.00625, 0.0125, 0.025, 0.05, 0.1, 1.0])


def test_without_fine_tuning_all_parameters_have_the_same_learning_rate():
    assert lr_scales(create("densenet_tiny", 5), Finetune()) == {}


@pytest.mark.parametrize(("scaling", "peak"), [("none", 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_lr_scaling_by_the_global_batch(scaling, peak):
    config = RunConfig.model_validate({"optim": {"lr_scaling": scaling}})
    assert config.optim.peak_lr(1024) == pytest.approx(peak)
