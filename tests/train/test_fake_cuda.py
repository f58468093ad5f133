"""A worker's torch code on fake CUDA tensors: devices, dtypes and waits, on a machine without a GPU.

Fake tensors compute no values: an operator between devices raises, and so does reading a value, which on a GPU would
wait for the device. Without a GPU, autograd refuses backward passes on CUDA, so the gradients are synthetic.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pipeline.config import Model
from pipeline.config_data import Augment
from pipeline.config_train import Loss, Optim
from pipeline.data import batch_ops
from pipeline.data.augment import draw_counts, plan_augmentations
from pipeline.data.philox import CROP, draw
from pipeline.model.densenet import create
from pipeline.train.evaluate import AccuracyCounter
from pipeline.train.loss import Criterion
from pipeline.train.optim import create_optimizer, parameter_groups

BATCH, CLASSES, SIDE = 8, 5, 32
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    caches = (batch_ops._noise, batch_ops._constant)
    for cache in caches:
        cache.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    for cache in caches:
        cache.cache_clear()


def images() -> torch.Tensor:
    return torch.empty(BATCH, 3, SIDE, SIDE, device=CUDA)


def labels() -> torch.Tensor:
    return torch.zeros(BATCH, dtype=torch.int64, device=CUDA)


def test_fake_tensors_refuse_what_a_gpu_refuses_or_waits_for():
    with pytest.raises(DataDependentOutputException):
        images().sum().item()
    with pytest.raises(RuntimeError, match="device"):
        images() + torch.empty(SIDE)


@pytest.mark.parametrize("memory", ["none", "activation-checkpointing", "shared-stats"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_forward_pass_and_optimizer_step_stay_on_the_gpu_and_keeps_weights_and_statistics_in_fp32(dtype, memory):
    with CUDA:  # `model.to` cannot move fake parameters
        model = create(Model(name="densenet_tiny", memory=memory), CLASSES)
    optimizer = create_optimizer(parameter_groups(model, 1e-4), Optim())
    formats = []

    def record(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        formats.append(output.is_contiguous(memory_format=torch.channels_last))

    model.features.denseblock2.denselayer1.conv2.register_forward_hook(record)
    batch_NCHW = images().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        logits_NK = model(batch_NCHW)
    assert logits_NK.dtype == (dtype or torch.float32)
    loss = Criterion(Loss(label_smoothing=0.1), CLASSES)(logits_NK.float(), labels(), batch_NCHW)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    tensors = [loss, *model.parameters(), *model.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert {tensor.device for tensor in tensors} == {CUDA}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    if dtype != torch.bfloat16:  # without a GPU, torch does not choose cuDNN for it
        assert formats == [True]


EVERYTHING = Augment(
    brightness=0.4, contrast=0.4, saturation=0.4, lighting=0.1, erase_prob=0.9, mixup_alpha=0.2, cutmix_alpha=1.0
)


@pytest.mark.parametrize("fill", ["mean", "noise"])
def test_all_batch_augmentations_stay_on_the_gpu_and_never_wait(fill):
    ids = np.arange(BATCH)
    draws = draw(7, np.zeros(BATCH, int), ids, {CROP: 1} | draw_counts(EVERYTHING))
    planned = plan_augmentations(EVERYTHING, 7, ids, draws, SIDE)
    assert None not in (planned.color, planned.erase, planned.mix)
    assert planned.erase.boxes_B4.any()
    assert planned.mix.boxes_B4.any()
    scale = (0.5, 0.5, 0.5)
    images_NCHW, targets_NK = batch_ops.apply(
        images(), labels(), planned, num_classes=CLASSES, mean=scale, std=scale, erase_fill=fill
    )
    images_NCHW = batch_ops.gray(images_NCHW, scale)
    assert (images_NCHW.device, images_NCHW.dtype, images_NCHW.shape) == (CUDA, torch.float32, (BATCH, 1, SIDE, SIDE))
    assert (targets_NK.device, targets_NK.dtype, targets_NK.shape) == (CUDA, torch.float32, (BATCH, CLASSES))


def test_counting_correct_predictions_never_waits():
    counter = AccuracyCounter(CLASSES, CUDA)
    for _ in range(2):
        counter.add(torch.empty(BATCH, CLASSES, device=CUDA), labels())
    tensors = (counter._counts, counter._loss, counter._matrix_KK)
    assert {tensor.device for tensor in tensors} == {CUDA}
