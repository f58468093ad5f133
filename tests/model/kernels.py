"""Runs the fused kernels without a GPU: corrects Triton's interpreter, and compiles ahead of time."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pipeline.model import fused_kernels
from pipeline.model.fused_kernels import Tiles

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def correct_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.8's interpreter multiplies the bit patterns of bf16 values, and truncates fp32 to bf16."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def dot_of_values(self: Any, a: TensorHandle, b: TensorHandle, *options: Any) -> TensorHandle:
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return dot(self, a, b, *options)

    def rounded(self: Any, source: TensorHandle, dtype: Any) -> TensorHandle:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        bits = torch.from_numpy(source.data).bfloat16().view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_of_values)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)


def compiled_usage(backward: bool, dtype: str, outputs: int, architecture: int, folder: Path) -> dict[str, int]:
    """Compiles a kernel for 16-byte aligned rows and a CUDA architecture; returns registers, stack and shared memory.

    `STACK` is the bytes of spilled registers, `SHARED` the bytes per program.
    """
    table = fused_kernels.BACKWARD if backward else fused_kernels.FORWARD
    kernel = fused_kernels.backward_kernel if backward else fused_kernels.forward_kernel
    tiles: Tiles = table[4 if dtype == "fp32" else 2]
    constants: dict[str, Any] = {"BM": tiles.rows, "BC": tiles.channels, "BK": fused_kernels.padded(outputs)}
    if backward:
        constants["ADD"] = True
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= {name: f"*{dtype}" for name in ("x", "weight", "y", "y_grad", "x_grad") if name in types}
    types |= {name: "*fp32" for name in ("affine", "scale_sums", "bias_sums", "weight_sums") if name in types}
    aligned = [i for i, name in enumerate(types) if types[name] != "constexpr"]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    printed = subprocess.run([CUOBJDUMP, "-res-usage", cubin], stdout=subprocess.PIPE, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return usage | {"SHARED": compiled.metadata.shared}
