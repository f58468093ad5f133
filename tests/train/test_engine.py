"""The engine against plain PyTorch, batch norm over ranks, mixed precision, gradient clipping, full weights."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.config import RunConfig
from pipeline.derived import Derived, derive
from pipeline.errors import ConfigError
from pipeline.model.densenet import create
from pipeline.train.deepspeed_config import deepspeed_config
from pipeline.train.engine import Engine, average_batch_norm
from pipeline.train.optim import create_optimizer, parameter_groups

CPU = torch.device("cpu")


def settings(stage: int, workers: int = 1, **optim: object) -> tuple[RunConfig, Derived]:
    config = RunConfig.model_validate(
        {
            "model": {"name": "densenet_tiny"},
            "train": {"epochs": 1, "global_batch_size": 8},
            "engine": {"zero_stage": stage},
            "optim": optim,
        }
    )
    d = derive(
        config,
        workers=workers,
        cpus_per_worker=1,
        device="cpu",
        train_samples=80,
        val_samples=8,
        num_classes=5,
    )
    return config, d


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 5, (8,), generator=generator))
        for _ in range(n)
    ]


def plain_losses(config: RunConfig, d: Derived) -> list[float]:
    torch.manual_seed(0)
    model = create("densenet_tiny", d.num_classes)
    optimizer = create_optimizer(parameter_groups(model, config.optim.weight_decay), config.optim)
    losses = []
    for images_NCHW, labels_N in batches(5):
        loss = F.cross_entropy(model(images_NCHW), labels_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def norm_after_averaging() -> tuple[torch.Tensor, torch.Tensor]:
    rank = torch.distributed.get_rank()
    norm = torch.nn.BatchNorm2d(3)
    norm(torch.full((2, 3, 4, 4), float(rank)) + torch.arange(32.0).reshape(2, 1, 4, 4))
    before = norm.running_mean.clone()
    average_batch_norm(norm)
    return before, norm.running_mean


def test_running_statistics_are_averaged_over_ranks_that_saw_different_data(run_ranks):
    (before0, after0), (before1, after1) = run_ranks(2, norm_after_averaging)
    assert not torch.equal(before0, before1)
    assert torch.equal(after0, after1)
    assert torch.allclose(after0, (before0 + before1) / 2)


def test_gradient_clipping_is_always_explicit():
    config, d = settings(1)
    assert deepspeed_config(config, d)["gradient_clipping"] == 0.0
    config, d = settings(0, clip_grad_norm=2.5)
    assert deepspeed_config(config, d)["gradient_clipping"] == 2.5


def test_without_clip_grad_norm_gradients_are_not_clipped(one_rank):
    """DeepSpeed 0.19 clips to norm 1 by default: a large gradient must arrive unclipped."""
    config, d = settings(1, lr=1.0, momentum=0, nesterov=False, weight_decay=0)
    model = torch.nn.Linear(1, 1, bias=False)
    engine = Engine(config, d, model, CPU)
    before = engine.full_state()["weight"]
    engine.backward(engine.forward(torch.full((8, 1), 800.0)).mean())
    engine.step()
    assert (before - engine.full_state()["weight"]).item() == pytest.approx(800.0)


def test_bf16_mixed_precision_keeps_weights_and_statistics_in_fp32(one_rank):
    config, d = settings(1)
    torch.manual_seed(0)
    engine = Engine(config, d.model_copy(update={"precision": "bf16"}), create("densenet_tiny", d.num_classes), CPU)
    seen: dict[str, torch.dtype] = {}
    for name in ("conv0", "norm0"):
        module = engine.module.get_submodule(f"features.{name}")
        module.register_forward_hook(lambda m, inputs, output, name=name: seen.update({name: output.dtype}))
    images_NCHW, labels_N = batches(1)[0]
    loss = F.cross_entropy(engine.forward(images_NCHW), labels_N)
    engine.backward(loss)
    engine.step()
    assert loss.item() == pytest.approx(plain_losses(config, d)[0], abs=0.05)
    assert seen["conv0"] == torch.bfloat16
    weights = engine.full_state()
    assert {w.dtype for k, w in weights.items() if not k.endswith("num_batches_tracked")} == {torch.float32}


def test_further_keys_reach_deepspeed_and_contradictions_are_refused():
    config, d = settings(2)

    def merged(**keys: object) -> dict:
        engine = config.engine.model_copy(update={"deepspeed": keys})
        return deepspeed_config(config.model_copy(update={"engine": engine}), d)

    assert merged(zero_optimization={"overlap_comm": True})["zero_optimization"]["overlap_comm"] is True
    assert merged(zero_optimization={"overlap_comm": True})["zero_optimization"]["stage"] == 2
    assert merged(wall_clock_breakdown=True)["wall_clock_breakdown"] is True
    with pytest.raises(ConfigError, match=r"engine.deepspeed.zero_optimization.stage=3 contradicts 2, .* omit it"):
        merged(zero_optimization={"stage": 3})
    with pytest.raises(ConfigError, match=r"engine.deepspeed.gradient_clipping=1.0 contradicts 0.0"):
        merged(gradient_clipping=1.0)


def test_communication_data_type_reaches_deepspeed():
    config, d = settings(1)
    assert "communication_data_type" not in deepspeed_config(config, d)
    engine = config.engine.model_copy(update={"communication_data_type": "bf16"})
    assert deepspeed_config(config.model_copy(update={"engine": engine}), d)["communication_data_type"] == "bf16"


def test_fp16_skips_steps_with_overflowed_gradients_and_continues(one_rank):
    """The first loss scale, 65536, is far too large for this gradient; it is halved until a step succeeds."""
    config, d = settings(0, lr=0.02)
    torch.manual_seed(0)
    engine = Engine(config, d.model_copy(update={"precision": "fp16"}), create("densenet_tiny", d.num_classes), CPU)
    images_NCHW, labels_N = batches(1)[0]
    scales, moved = [], []
    for _ in range(12):
        before = engine.full_state()["classifier.weight"]
        engine.backward(1000 * F.cross_entropy(engine.forward(images_NCHW), labels_N))
        applied = engine.step()
        moved.append(not torch.equal(before, engine.full_state()["classifier.weight"]))
        assert applied == moved[-1]
        scales.append(engine.loss_scaler.get_scale())
    assert not moved[0]
    assert scales[0] == 2**15
    first = moved.index(True)
    assert scales[first - 1] == 2.0 ** (16 - first)
    assert engine.full_state()["features.conv0.weight"].dtype == torch.float32


def test_fp16_is_refused_at_zero_stages_where_deepspeed_would_skip_every_step():
    with pytest.raises(ValueError, match="train.precision=fp16 needs engine.zero_stage=0"):
        RunConfig.model_validate({"train": {"precision": "fp16"}, "engine": {"zero_stage": 1}})


def norms(clip: float | None) -> list[float]:
    """Returns the first step's gradient norm from plain PyTorch, and from the engine at stages 0 to 3."""
    found = []
    images_NCHW, labels_N = batches(1)[0]
    for stage in (None, 0, 1, 2, 3):
        torch.manual_seed(0)
        model = create("densenet_tiny", 5)
        if stage is None:
            F.cross_entropy(model(images_NCHW), labels_N).backward()
            found.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
            continue
        config, d = settings(stage, clip_grad_norm=clip)
        engine = Engine(config, d, model, CPU)
        engine.backward(F.cross_entropy(engine.forward(images_NCHW), labels_N))
        engine.step(measure_norm=True)
        found.append(engine.grad_norm)
    return found


@pytest.mark.parametrize("clip", [None, 0.01])
def test_grad_norm_is_the_norm_before_clipping(run_ranks, clip):
    ((plain, *by_stage),) = run_ranks(1, norms, clip)
    assert by_stage == pytest.approx([plain] * 4, rel=1e-4)
