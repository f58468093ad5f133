"""Runs one step of `benchmarks.gpu`.

python -m benchmarks.gpu.steps STEP --output FOLDER [--images FOLDER] [--cifar FOLDER] [--tiny]
"""

import argparse
import importlib
import os
import sys
import warnings
from importlib.metadata import distributions
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import output_of
from benchmarks.gpu.context import Context

# Function of each step; its module is imported only then, so that a missing package fails no other step.
FUNCTIONS = {
    "decode": "run_steps.decode",
    "zero": "model_steps.zero",
    "throughput": "model_steps.training_throughput",
    "feed": "run_steps.feed",
    "resume": "run_steps.resume",
    "cifar": "run_steps.cifar",
    "train": "run_steps.train",
    "fused": "kernel_steps.fused",
    "memory": "model_steps.memory",
    "switches": "model_steps.switches",
    "compile": "model_steps.compiled",
    "two_gpus": "model_steps.two_gpus",
}


def environment(context: Context) -> None:
    """Records the machine, its packages and torch's defaults."""
    context.record(python=sys.version, cores=len(os.sched_getaffinity(0)), memory=output_of("free", "-g"))
    context.record(packages=dict(sorted((d.metadata["Name"], d.version) for d in distributions())))
    query = "name,driver_version,memory.total,clocks.max.sm"
    context.record(gpus=output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines())
    context.record(
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=None if context.tiny else torch.cuda.nccl.version(),
        cudnn_tf32=torch.backends.cudnn.allow_tf32,
        matmul_precision=torch.get_float32_matmul_precision(),
    )


def main() -> None:
    """Runs one step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=["environment", *FUNCTIONS])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no CUDA device")
    warnings.simplefilter("once")
    common.RESULTS = options.output / "results.csv"
    context = Context(options.step, options.output, options.images, options.cifar, options.tiny)
    if options.step == "environment":
        environment(context)
        return
    module, _, function = FUNCTIONS[options.step].partition(".")
    getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(context)


if __name__ == "__main__":
    main()
