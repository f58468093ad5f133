"""Equal losses at all ZeRO stages, memory modes, gradient accumulation steps and numbers of ranks."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.config import RunConfig
from pipeline.derived import derive
from pipeline.model.densenet import create
from pipeline.train.engine import Engine
from pipeline.train.optim import create_optimizer, parameter_groups
from pipeline.train.schedule import learning_rate

CPU, BATCH, STEPS = torch.device("cpu"), 32, 20


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    size = (BATCH, 3, 24, 24)
    return [
        (torch.randn(size, generator=generator), torch.randint(0, 5, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def losses(
    stage: int, device_batch: int, frozen: bool, memory: str = "none", engine: dict | None = None
) -> list[float]:
    """Returns each step's mean loss over all ranks, each rank on its part of the batches."""
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = RunConfig.model_validate(
        {
            "model": {"name": "densenet_tiny", "memory": memory},
            "train": {"global_batch_size": BATCH, "max_device_batch_size": device_batch, "epochs": 1},
            "engine": {"zero_stage": stage} | (engine or {}),
            "finetune": {"freeze_batch_norm": frozen},
            "optim": {"lr": 0.02, "clip_grad_norm": 1.0},
        }
    )
    sizes = {"train_samples": BATCH * STEPS, "val_samples": 1, "num_classes": 5}
    derived = derive(config, workers=workers, cpus_per_worker=1, device="cpu", **sizes)
    torch.manual_seed(0)
    trained = Engine(config, derived, create(config.model, 5), CPU)
    found = []
    for step, (images_NCHW, labels_N) in enumerate(batches()):
        trained.set_learning_rate(learning_rate(config.schedule, derived, step * BATCH))
        total = torch.zeros(())
        for micro in range(derived.gradient_accumulation_steps):
            first = (micro * workers + rank) * device_batch
            part = slice(first, first + device_batch)
            loss = F.cross_entropy(trained.forward(images_NCHW[part]), labels_N[part])
            trained.backward(loss)
            total += loss.detach() / derived.gradient_accumulation_steps / workers
        trained.step()
        torch.distributed.all_reduce(total)
        found.append(total.item())
    return found


def plain(frozen: bool) -> list[float]:
    """Returns the losses of a plain PyTorch loop."""
    torch.manual_seed(0)
    model = create("densenet_tiny", 5)
    config = RunConfig.model_validate({"train": {"global_batch_size": BATCH, "epochs": 1}, "optim": {"lr": 0.02}})
    sizes = {"train_samples": BATCH * STEPS, "val_samples": 1, "num_classes": 5}
    derived = derive(config, workers=1, cpus_per_worker=1, device="cpu", **sizes)
    if frozen:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval().requires_grad_(False)
    optimizer = create_optimizer(parameter_groups(model, config.optim.weight_decay), config.optim)
    found = []
    for step, (images_NCHW, labels_N) in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, derived, step * BATCH)
        loss = F.cross_entropy(model(images_NCHW), labels_N)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def some_stages(memory: dict[int, str], device_batch: int, frozen: bool) -> dict[int, list[float]]:
    """Returns the losses by ZeRO stage, each with its memory mode."""
    return {stage: losses(stage, device_batch, frozen, mode) for stage, mode in memory.items()}


@pytest.mark.slow
def test_every_zero_stage_has_the_losses_of_a_plain_loop_over_20_steps(run_ranks):
    """The memory modes change nothing either."""
    expected = plain(frozen=False)
    (found,) = run_ranks(
        1, some_stages, {0: "none", 1: "fused", 2: "shared-stats", 3: "activation-checkpointing"}, BATCH, False
    )
    for stage, losses_of_stage in found.items():
        assert losses_of_stage == pytest.approx(expected, rel=1e-3), f"stage {stage}"


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "device_batch"), [((0, 3), 8), ((1, 2), 16)])
def test_two_ranks_with_gradient_accumulation_have_the_losses_of_one_batch_with_frozen_norms(
    run_ranks, stages, device_batch
):
    expected = plain(frozen=True)
    for found in run_ranks(2, some_stages, dict.fromkeys(stages, "none"), device_batch, True):
        for stage, losses_of_stage in found.items():
            assert losses_of_stage == pytest.approx(expected, rel=1e-3), f"stage {stage}"


def offloaded() -> list[list[float]]:
    options = {"offload_optimizer": True, "reduce_bucket_size": 50_000}
    return [losses(stage, BATCH, False, engine=options) for stage in (1, 2, 3)]


@pytest.mark.slow
def test_offloading_and_small_buckets_change_nothing(run_ranks):
    expected = plain(frozen=False)
    for stage, found in enumerate(run_ranks(1, offloaded)[0]):
        assert found == pytest.approx(expected, rel=1e-4), f"stage {stage + 1}"
