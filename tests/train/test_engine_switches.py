"""Engine options: EMA, channels last, torch.compile, frozen norms, layer decay."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import config as inductor

from pipeline.derived import derive_for_workers
from pipeline.errors import UserError
from pipeline.model.densenet import create
from pipeline.train.engine import Engine
from tests.train.test_engine import CPU, batches, plain_losses, settings

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")


def create_engine(stage: int, sections: dict, warn=print, accumulation: int = 1) -> Engine:
    config, d = settings(stage)
    updates = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    config = config.model_copy(update=updates)
    d = derive_for_workers(d, config, d.workers).model_copy(
        update={"device_batch_size": d.device_batch_size // accumulation, "gradient_accumulation_steps": accumulation}
    )
    torch.manual_seed(0)
    return Engine(config, d, create("densenet_tiny", d.num_classes), CPU, warn)


def backward(engine: Engine, images_NCHW: torch.Tensor, labels_N: torch.Tensor) -> float:
    loss = F.cross_entropy(engine.forward(images_NCHW), labels_N)
    engine.backward(loss)
    return loss.item()


def step(engine: Engine, images_NCHW: torch.Tensor, labels_N: torch.Tensor) -> float:
    loss = backward(engine, images_NCHW, labels_N)
    engine.step()
    return loss


def emas() -> list[bool]:
    return [ema_equals_one_by_hand(stage) for stage in (0, 1, 2, 3)]


def ema_equals_one_by_hand(stage: int) -> bool:
    """With two micro-batches per step, against an EMA of the full weights updated after every step."""
    engine = create_engine(stage, {"ema": {"decay": 0.4}}, accumulation=2)
    expected = engine.full_state()
    for i, (images_NCHW, labels_N) in enumerate(batches(4)):
        for half in (slice(4), slice(4, None)):
            backward(engine, images_NCHW[half], labels_N[half])
        engine.step()
        engine.update_ema(i + 1)
        decay = min(0.4, 1 - (1 + i) ** (-2 / 3))  # warmup: 0, 0.37, then 0.4
        for key, new in engine.full_state().items():
            if new.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * new
            else:
                expected[key] = new
    got = engine.ema_state()
    engine.ema.eval()
    with torch.no_grad():
        logits_NK = engine.infer(engine.ema, batches(1)[0][0])
    model = create("densenet_tiny", 5)
    model.load_state_dict(got)
    with torch.no_grad():
        same_logits = torch.equal(logits_NK, model.eval()(batches(1)[0][0]))
    return same_logits and all(torch.allclose(got[k], expected[k], atol=1e-6) for k in expected)


@pytest.mark.slow
def test_the_ema_is_updated_once_per_step_at_every_stage(run_ranks):
    assert run_ranks(1, emas) == [[True] * 4]


def layouts() -> list[bool]:
    found = []
    for stage in (0, 1, 2, 3):
        engine = create_engine(stage, {"engine": {"channels_last": True, "zero_stage": stage}})

        def record(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            found.append(output.is_contiguous(memory_format=torch.channels_last))

        engine.module.features.denseblock2.denselayer1.conv2.register_forward_hook(record)
        step(engine, *batches(1)[0])
    return found


@pytest.mark.slow
def test_channels_last_reaches_the_features_at_every_stage(run_ranks):
    assert run_ranks(1, layouts) == [[True] * 4]


def test_channels_last_computes_the_same(one_rank):
    config, d = settings(1)
    engine = create_engine(1, {"engine": {"channels_last": True}})
    losses = [step(engine, *batch) for batch in batches(5)]
    assert losses == pytest.approx(plain_losses(config, d), rel=1e-4)
    assert all(value.is_contiguous() for value in engine.full_state().values())


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    features = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    return torch.nn.Sequential(*features, torch.nn.Flatten(), torch.nn.Linear(8, 5))


@COMPILER
@pytest.mark.slow
def test_a_compiled_model_computes_the_same_under_its_own_names(one_rank):
    losses = {}
    for switch in ("off", "on"):
        config, d = settings(1)
        engine = config.engine.model_copy(update={"compile": switch})
        data = config.data.model_copy(update={"image_size": 32})
        engine = Engine(config.model_copy(update={"engine": engine, "data": data}), d, small_model(), CPU)
        compiled = torch._dynamo.utils.counters["aot_autograd"]["total"]
        losses[switch] = [step(engine, *batch) for batch in batches(5)]
        assert torch._dynamo.utils.counters["aot_autograd"]["total"] == compiled, "compiled before training"
        assert compiled >= (switch == "on")
        assert set(engine.full_state()) == set(small_model().state_dict())
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-5)


def test_a_failed_compilation_is_an_error_or_with_try_a_warning(one_rank, monkeypatch, tmp_path):
    monkeypatch.setattr(inductor.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"torch.compile failed \(.*engine.compile=off, or engine.compile=try"):
        create_engine(1, {"engine": {"compile": "on"}, "data": {"image_size": 32}})
    torch._dynamo.reset()
    warnings: list[str] = []
    engine = create_engine(1, {"engine": {"compile": "try"}, "data": {"image_size": 32}}, warnings.append)
    assert len(warnings) == 1
    assert "the model runs uncompiled" in warnings[0]
    losses = [step(engine, *batch) for batch in batches(5)]
    config, d = settings(1)
    assert losses == pytest.approx(plain_losses(config, d), rel=1e-5)


@pytest.mark.parametrize(("finetune", "moving"), [({"freeze_batch_norm": True}, 0), ({"freeze_blocks": 2}, 1)])
def test_frozen_norms_keep_their_statistics_and_weights(one_rank, finetune, moving):
    engine = create_engine(1, {"finetune": finetune})
    before = engine.full_state()
    engine.train(False)
    engine.train(True)
    for batch in batches(2):
        step(engine, *batch)
    after = engine.full_state()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    statistics = {key for key in changed if "running" in key}
    assert bool(statistics) == bool(moving)
    assert "classifier.weight" in changed
    frozen = (
        "features.conv0",
        "features.norm0",
        "features.denseblock1",
        "features.denseblock2",
        "features.transition2",
    )
    if "freeze_blocks" in finetune:
        assert not any(key.startswith(frozen) for key in changed)
        assert "features.denseblock3.denselayer1.norm1.running_mean" in changed
    else:
        assert not any("norm" in key for key in changed)


def test_layer_decay_lowers_the_learning_rate_of_the_stem(one_rank):
    moved = {}
    for decay in (1.0, 0.1):
        engine = create_engine(1, {"finetune": {"layer_decay": decay}})
        engine.set_learning_rate(0.1)
        before = engine.full_state()["features.conv0.weight"]
        step(engine, *batches(1)[0])
        moved[decay] = (engine.full_state()["features.conv0.weight"] - before).norm().item()
    assert moved[0.1] == pytest.approx(1e-4 * moved[1.0], rel=0.05)
