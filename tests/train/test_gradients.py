"""Waits for the device in a training step, and the reduction of gradients during the backward pass."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model.densenet import create
from pipeline.train.deepspeed_config import deepspeed_config
from pipeline.train.engine import Engine
from pipeline.train.gradients import order_streams_on_device
from tests.train import test_engine
from tests.train.settings import CPU, new_trainer, settings
from tests.train.test_engine import batches

aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts the calls that on CUDA make the host wait for a value: `item`, `float(tensor)`, `bool(tensor)`, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.exchanges = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (aten._local_scalar_dense, aten.masked_select, aten.unique_dim)
        self.exchanges += function.overloadpacket is aten.nonzero  # of the ranks with a NaN loss, on the host
        return function(*args, **kwargs or {})


def waits(indexes, folder) -> list[set[tuple[int, int]]]:
    """Returns the different numbers of waits and exchanges in a step that does not log, by stage."""
    workers, micro_batches = torch.distributed.get_world_size(), 2
    sections = {
        "train": {"epochs": 1, "log_every_steps": 99, "max_device_batch_size": 8 // workers // micro_batches},
        "optim": {"clip_grad_norm": 0.1},
        "ema": {"decay": 0.9},
        "augment": {"brightness": 0.4},
    }
    found = []
    for stage in range(4):
        per_batch = []
        config, derived = settings(*indexes, workers, engine={"zero_stage": stage}, **sections)
        with Waits() as mode:

            def heartbeat(mode=mode, per_batch=per_batch) -> None:
                per_batch.append((mode.count, mode.exchanges))

            run_dir = folder / f"stage{stage}"
            new_trainer(config, derived, indexes, run_dir, lambda event: None, heartbeat=heartbeat).fit()
        starts = per_batch[: derived.total_steps * micro_batches : micro_batches]
        # Not the first step, in which DeepSpeed's stage 3 compares the order of the layers between the ranks.
        found.append({(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(starts[1:])})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_waits_for_nothing_but_the_exchange_of_the_loss(run_ranks, indexes, tmp_path, workers):
    constant = {(1, 1)}  # at stage 3 DeepSpeed reads a constant that is on the host
    for found in run_ranks(workers, waits, indexes(), tmp_path):
        assert found == [{(0, 1)}, {(0, 1)}, {(0, 1)}, constant]


def trained(stage: int, bucket_size: int, zero: dict | None = None) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """Trains three steps of two micro-batches; returns the weights, and for each bucket whether gradients were missing.

    Each rank has its own images.
    """
    config, d = test_engine.settings(stage, torch.distributed.get_world_size())
    options = {"reduce_bucket_size": bucket_size, "deepspeed": {"zero_optimization": zero} if zero else {}}
    config = config.model_copy(update={"engine": config.engine.model_copy(update=options)})
    d = d.model_copy(update={"device_batch_size": 4, "gradient_accumulation_steps": 2})
    torch.manual_seed(0)
    engine = Engine(config, d, create("densenet_tiny", d.num_classes), CPU)
    first, reduce, missing = engine.module.features.conv0.weight, engine._engine.allreduce_and_copy, []

    def recorded(*args):
        missing.append(first not in engine._reduction._reduced)
        reduce(*args)

    engine._engine.allreduce_and_copy = recorded
    half = slice(4) if torch.distributed.get_rank() == 0 else slice(4, None)
    for images_NCHW, labels_N in batches(3):
        for _ in range(2):
            engine.backward(F.cross_entropy(engine.forward(images_NCHW[half]), labels_N[half]))
        engine.step()
    state = engine.full_state()
    engine.close()
    return state, missing


def reductions() -> list[tuple[dict[str, torch.Tensor], list[bool]]]:
    one, many, overlap = 10**9, 5000, {"overlap_comm": True}
    return [trained(0, one), trained(0, many), trained(1, one), trained(1, many, overlap), trained(2, many, overlap)]


def test_gradients_are_averaged_during_the_backward_pass_with_equal_results(run_ranks):
    (one, one_missing), (many, missing), *zero = run_ranks(2, reductions)[0]
    assert one_missing == [False] * 3, "one bucket in each step, after the backward pass"
    assert missing[0]
    assert sum(missing) > len(missing) / 2
    for weights in (many, *(weights for weights, _ in zero)):
        assert all(torch.equal(one[name], weights[name]) for name in one)


def unused_parameter() -> torch.Tensor:
    """Returns the gradient of a parameter that takes no part in the loss, before the step."""
    config, d = test_engine.settings(0, torch.distributed.get_world_size())
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
    model.forward = lambda images: model["used"](images)
    engine = Engine(config, d, model, CPU)
    engine.backward(engine.forward(torch.ones(8, 2)).mean())
    return engine.module["unused"].weight.grad


def test_a_parameter_without_a_gradient_has_zeros_on_all_ranks(run_ranks):
    assert all(torch.equal(grad, torch.zeros(2, 2)) for grad in run_ranks(2, unused_parameter))


def test_on_gpus_reduction_overlaps_with_the_backward_pass_unless_set_otherwise():
    config, d = test_engine.settings(1, workers=2)
    gpu = d.model_copy(update={"device": "cuda"})
    assert deepspeed_config(config, gpu)["zero_optimization"]["overlap_comm"] is True
    assert deepspeed_config(config, d)["zero_optimization"]["overlap_comm"] is False
    further = config.engine.model_copy(update={"deepspeed": {"zero_optimization": {"overlap_comm": False}}})
    config = config.model_copy(update={"engine": further})
    assert deepspeed_config(config, gpu)["zero_optimization"]["overlap_comm"] is False


def test_the_step_waits_for_the_reduction_on_the_device():
    calls = []
    stream = SimpleNamespace(wait_stream=lambda other: calls.append(f"wait for {other}"))
    accelerator = SimpleNamespace(synchronize=lambda: calls.append("synchronize"), current_stream=lambda: stream)
    zero = SimpleNamespace(reduction_stream="reduction")
    zero.independent_gradient_partition_epilogue = lambda: accelerator.synchronize()
    order_streams_on_device(zero, accelerator)
    zero.independent_gradient_partition_epilogue()
    accelerator.synchronize()
    assert calls == ["wait for reduction", "synchronize"]
