"""Memory modes (activation checkpointing): same losses, gradients and running statistics, fewer stored activations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.config import Model
from pipeline.model.densenet import create

NAME, STEPS = "densenet_bc_l40_k12", 2
MODES = ("activation-checkpointing", "shared-stats", "fused")


def trained(memory: str, dtype: torch.dtype, freeze: bool = False) -> tuple[list[torch.Tensor], nn.Module]:
    """Losses of a few steps, and the model after them with the last step's gradients."""
    torch.manual_seed(0)
    model = create(Model(name=NAME, memory=memory), 10).to(dtype)
    if freeze:
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
    losses = []
    for _ in range(STEPS):
        images_NCHW, labels_N = torch.randn(4, 3, 16, 16, dtype=dtype), torch.randint(0, 10, (4,))
        model.zero_grad()
        loss = F.cross_entropy(model(images_NCHW), labels_N)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
        losses.append(loss.detach())
    return losses, model


@pytest.mark.parametrize("freeze", [False, True], ids=["training", "frozen norms"])
@pytest.mark.parametrize("memory", MODES)
def test_a_memory_mode_equals_the_plain_model(memory, freeze):
    expected, plain = trained("none", torch.float64, freeze)
    losses, model = trained(memory, torch.float64, freeze)
    assert torch.allclose(torch.stack(losses), torch.stack(expected), rtol=1e-12)
    state, plain_state = model.state_dict(), plain.state_dict()
    assert list(state) == list(plain_state)
    for name, value in plain_state.items():
        assert torch.allclose(state[name], value, rtol=1e-9, atol=1e-12), name
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-7, atol=1e-10), name
    images_NCHW = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(model.eval()(images_NCHW), plain.eval()(images_NCHW), rtol=1e-9)


def activation_bytes(memory: str) -> int:
    """Bytes of the tensors that a forward pass stores for the backward pass, each storage counted once."""
    model = create(Model(name=NAME, memory=memory), 10)
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(4, 3, 32, 32))
    return sum(storage.nbytes() for storage in storages.values())


def test_the_modes_store_fewer_activations():
    plain = activation_bytes("none")
    assert all(activation_bytes(memory) < 0.7 * plain for memory in MODES)


@pytest.mark.parametrize("memory", MODES)
def test_mixed_precision_stays_close(memory):
    torch.manual_seed(0)
    images_NCHW = torch.randn(8, 3, 32, 32)
    logits = {}
    for mode in ("none", memory):
        torch.manual_seed(1)
        model = create(Model(name=NAME, memory=mode), 10)
        with torch.autocast("cpu", torch.bfloat16):
            logits[mode] = model(images_NCHW)
        logits[mode].float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.allclose(logits[memory].float(), logits["none"].float(), atol=0.1)
