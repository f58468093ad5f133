"""The fused operator and its dense block equal the plain ones; its kernels run in Triton's interpreter and compile.

`TRITON_INTERPRET=1 pytest tests/model/test_fused.py` runs the tests of operator and block with the kernels. With CUDA,
the tests of the operator and of mixed precision run on the GPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from timm.models.densenet import DenseBlock
from torch import nn

from pipeline.errors import UserError
from pipeline.model import fused_kernels
from pipeline.model.fused import Eager, FusedBlock, operator_for
from tests.model.kernels import compiled_usage, correct_bf16

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"  # of the operator's tests
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative
TF32_ROUNDING = 2.0**-10
# Rows, channels, outputs, programs of the backward pass: tiles are partly empty; with few programs each has many tiles.
SHAPES = ((98, 64, 48, 256), (150, 40, 128, 256), (33, 70, 192, 256), (290, 70, 48, 6))


@pytest.fixture(autouse=True, scope="module")
def corrected_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if INTERPRETED:
            correct_bf16(monkeypatch)
        yield


def operands(rows: int, channels: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Features with 24 channels more than are read, mean, scale and bias, weight, gradients of result and features."""
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    matrices = 3 + random(rows, channels + 24), random(outputs, channels), random(rows, outputs)
    affine_3C = torch.stack((3 + random(channels), random(channels), random(channels)))
    x_MC, weight_KC, grad_MK = (matrix.to(dtype) for matrix in matrices)
    return x_MC, affine_3C, weight_KC, grad_MK, random(rows, channels + 24).to(dtype)


def reference(
    x_MC: torch.Tensor, affine_3C: torch.Tensor, weight_KC: torch.Tensor, grad_MK: torch.Tensor
) -> list[torch.Tensor]:
    """The result by autograd in float64, and the gradients of x, scale, bias and weight."""
    x_MC, weight_KC = x_MC[:, : weight_KC.shape[1]].double().requires_grad_(), weight_KC.double().requires_grad_()
    mean_C, scale_C, bias_C = affine_3C.double()
    scale_C.requires_grad_()
    bias_C.requires_grad_()
    y_MK = F.relu((x_MC - mean_C) * scale_C + bias_C) @ weight_KC.T
    return [y_MK.detach(), *torch.autograd.grad(y_MK, (x_MC, scale_C, bias_C, weight_KC), grad_MK.double())]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_operator_equals_autograd_to_round_off(dtype, shape, monkeypatch):
    rows, channels, outputs, programs = shape
    monkeypatch.setattr(fused_kernels, "SPLIT_PROGRAMS", programs)
    x_MC, affine_3C, weight_KC, grad_MK, grad_MC = operands(rows, channels, outputs, dtype)
    y_MK, x_grad_MC, scale_C, bias_C, weight_KC_grad = reference(x_MC, affine_3C, weight_KC, grad_MK)
    added_MC = grad_MC.clone()
    operator = operator_for(x_MC)
    assert (operator is Eager) == (DEVICE == "cpu" and not INTERPRETED)
    found_MK = operator.forward(x_MC, affine_3C, weight_KC)
    found = operator.backward(x_MC, affine_3C, weight_KC, grad_MK, added_MC)
    # A sum of products is rounded in proportion to the sum of their sizes: once in storing it, and in each factor.
    stored = ROUNDING[dtype]
    factor = TF32_ROUNDING if DEVICE == "cuda" and dtype == torch.float32 else ROUNDING[torch.float32]
    centered_MC = x_MC[:, :channels].double() - affine_3C[0]
    activated_MC = F.relu(centered_MC * affine_3C[1] + affine_3C[2])
    weight_sizes_KC, grad_sizes_MK = weight_KC.double().abs(), grad_MK.double().abs()
    sizes_MC = grad_sizes_MK @ weight_sizes_KC
    for name, value, exact, sizes, rounding in (
        ("result", found_MK, y_MK, activated_MC @ weight_sizes_KC.T, 2 * stored + factor),
        ("scale", found[0], scale_C, (sizes_MC * centered_MC.abs()).sum(0), factor),
        ("bias", found[1], bias_C, sizes_MC.sum(0), factor),
        ("weight", found[2], weight_KC_grad, grad_sizes_MK.T @ activated_MC, stored + factor),
        ("features", added_MC[:, :channels], grad_MC[:, :channels] + x_grad_MC, grad_MC[:, :channels].abs(), stored),
    ):
        if name == "features":
            sizes = sizes + x_grad_MC.abs() + sizes_MC * affine_3C[1].abs() * factor / stored
        assert ((value - exact).abs() <= rounding * sizes + 1e-6).all(), name
    assert torch.equal(added_MC[:, channels:], grad_MC[:, channels:])
    assert found_MK.dtype == added_MC.dtype == dtype
    without = operator.backward(x_MC, affine_3C, weight_KC, grad_MK, None)
    assert all(torch.equal(a, b) for a, b in zip(without, found, strict=True)), "repeated calls differ"
    assert torch.equal(operator.forward(x_MC, affine_3C, weight_KC), found_MK), "repeated calls differ"


def test_nan_in_features_is_not_hidden_by_the_relu():
    x_MC, affine_3C, weight_KC, grad_MK, grad_MC = operands(40, 24, 48, torch.float32)
    x_MC[7, 3] = torch.nan
    assert operator_for(x_MC).forward(x_MC, affine_3C, weight_KC).isnan().all(1).nonzero().tolist() == [[7]]
    grad_scale_C, _, grad_weight_KC = operator_for(x_MC).backward(x_MC, affine_3C, weight_KC, grad_MK, grad_MC)
    assert grad_scale_C.isnan().nonzero().tolist() == [[3]]
    assert grad_weight_KC[:, 3].isnan().all()


def blocks(growth: int = 12, drop_rate: float = 0.0, layers: int = 3) -> tuple[nn.ModuleDict, FusedBlock]:
    """A plain block with random norms, and a fused copy."""
    torch.manual_seed(0)
    plain = DenseBlock(layers, 2 * growth, bn_size=4, growth_rate=growth, drop_rate=drop_rate)
    fused = DenseBlock(layers, 2 * growth, bn_size=4, growth_rate=growth, drop_rate=drop_rate)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 1, 0.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
    fused.load_state_dict(plain.state_dict())
    return plain.to(memory_format=torch.channels_last), FusedBlock(fused)


def step(block: nn.ModuleDict, first_NCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients of input and parameters where they have one, and buffers after one step."""
    torch.manual_seed(2)
    output_NCHW = block(first_NCHW)
    output_NCHW.backward(torch.randn(output_NCHW.shape, dtype=torch.float64).to(output_NCHW))
    found = {f"gradient of {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    if first_NCHW.grad is not None:
        found["gradient of the input"] = first_NCHW.grad
    return {"output": output_NCHW.detach(), **found, **dict(block.named_buffers())}


def images(channels: int = 24, dtype: torch.dtype = torch.float32, side: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images_NCHW = torch.randn(2, channels, side, side, generator=generator).to(dtype)
    return images_NCHW.to(memory_format=torch.channels_last).requires_grad_()


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        scale = value.abs().max().item()
        assert torch.allclose(found[name].to(value.dtype), value, rtol=1e-4, atol=1e-5 * (1 + scale)), name


def freeze_all(block: nn.ModuleDict) -> None:
    for layer in block.values():
        layer.norm1.eval()


def freeze_middle(block: nn.ModuleDict) -> None:
    block.denselayer2.norm1.eval()


def fix_parameters(block: nn.ModuleDict) -> None:
    """The gradient of the features is still needed; some parameters have none."""
    for layer in (block.denselayer1.norm1, block.denselayer2.conv1, block.denselayer3):
        layer.requires_grad_(False)


def fix_first_layers(block: nn.ModuleDict) -> None:
    for layer in (block.denselayer1, block.denselayer2):
        layer.requires_grad_(False)


@pytest.mark.parametrize("change", [None, freeze_all, freeze_middle, fix_parameters, fix_first_layers])
def test_a_block_equals_the_plain_block_in_float64(change):
    plain, fused = blocks()
    plain.double()
    if change:
        change(plain)
        change(fused)
    wants_input = change is not fix_first_layers
    first_NCHW, plain_NCHW = images().requires_grad_(wants_input), images(dtype=torch.float64)
    check_close(step(fused, first_NCHW), step(plain, plain_NCHW.detach().requires_grad_(wants_input)))


def test_evaluation_runs_the_plain_code():
    plain, fused = blocks()
    assert torch.equal(fused.eval()(images()), plain.eval()(images()))


@pytest.mark.parametrize("growth", [24, 32, 48])
def test_every_growth_rate(growth):
    plain, fused = blocks(growth, layers=2)
    first_NCHW, plain_NCHW = images(2 * growth, side=3), images(2 * growth, torch.float64, side=3)
    check_close(step(fused, first_NCHW), step(plain.double(), plain_NCHW))


def test_dropout_uses_the_same_random_numbers():
    plain, fused = blocks(drop_rate=0.3)
    check_close(step(fused, images()), step(plain, images()))


def test_backward_may_run_twice_and_does_not_change_the_given_gradient():
    _, fused = blocks()
    first_NCHW = images()
    output_NCHW = fused(first_NCHW)
    given_NCHW = torch.randn_like(output_NCHW)
    copy_NCHW = given_NCHW.clone()
    output_NCHW.backward(given_NCHW, retain_graph=True)
    once = [parameter.grad.clone() for parameter in [first_NCHW, *fused.parameters()]]
    output_NCHW.backward(given_NCHW)
    for parameter, gradient in zip([first_NCHW, *fused.parameters()], once, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)
    assert torch.equal(given_NCHW, copy_NCHW)


def test_the_gradient_of_an_inner_layer_alone():
    gradients = []
    for block in blocks():
        outputs: list[torch.Tensor] = []
        block.denselayer2.conv2.register_forward_hook(lambda _, inputs, output, outputs=outputs: outputs.append(output))
        first_NCHW = images()
        block(first_NCHW)
        gradients += torch.autograd.grad(outputs[0].square().sum(), first_NCHW)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)


def test_steps_repeat_bit_for_bit():
    first, second = (step(blocks()[1], images()) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_training_mode_without_gradients_updates_the_running_statistics():
    plain, fused = blocks()
    with torch.no_grad():
        assert torch.allclose(fused(images()), plain(images()), atol=1e-5)
    for name, buffer in plain.named_buffers():
        assert torch.allclose(fused.get_buffer(name), buffer, rtol=1e-4, atol=1e-6), name


def test_mixed_precision_is_as_accurate_as_the_plain_block():
    """Both errors are against float64 on the same bf16 input; both blocks round features and gradients to bf16."""
    plain, fused = blocks()
    first_NCHW = images(side=12).bfloat16().detach().to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, rounded = (step(b.to(DEVICE), first_NCHW.clone().requires_grad_()) for b in (fused, plain))
    exact = step(blocks()[0].to(DEVICE).double(), first_NCHW.double().requires_grad_())
    assert found["output"].dtype == torch.bfloat16

    def error(values: dict[str, torch.Tensor], name: str) -> float:
        return ((values[name].double() - exact[name]).norm() / exact[name].norm()).item()

    names = [name for name, value in exact.items() if value.is_floating_point()]
    for name in names:
        assert error(found, name) <= 2 * error(rounded, name) + 1e-3, name
    assert sum(error(found, n) for n in names) <= 1.2 * sum(error(rounded, n) for n in names)


def test_without_triton_the_error_names_the_package(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "pipeline.model.fused_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="model.memory=fused needs the package triton on GPUs, .*: pip install triton"):
        blocks()[1](images())


def test_full_fp32_products_do_not_use_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert operator_for(torch.zeros(1)) is Eager


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_kernels_pass_these_tests_in_tritons_interpreter(shell: Callable[..., subprocess.CompletedProcess[str]]):
    done = shell("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile_without_register_spills(dtype, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for backward, outputs in product([False, True], [48, 128, 192]):
        usage = compiled_usage(backward, dtype, outputs, architecture, tmp_path)
        case = f"{'backward' if backward else 'forward'}, {outputs} outputs: {usage}"
        print(case)
        assert usage["STACK"] == usage["LOCAL"] == 0, case
        assert usage["SHARED"] <= 100 * 1024, case
