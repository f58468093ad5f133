"""Performance estimate of a training run on a hypothetical cluster, NODESxGPUSxTYPE.

The model, in the order in which it is applied:

- Roofline (Williams et al. 2009): each layer takes the larger of its arithmetic over the GPU's peak FLOP/s and its
  memory traffic over the GPU's bandwidth, both times `EFFICIENCY`; a backward pass takes twice the forward pass.
- Each layer and pass of a micro-batch takes at least `LAUNCH_S`, which bounds small batches.
- Gradients are reduced by a ring all-reduce: 2 (n - 1) / n of their bytes over the slowest link, and 2 (n - 1) hops
  (Thakur et al. 2005). It does not overlap with the backward pass, as in DeepSpeed's ZeRO 1.
- Memory follows the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054) for fp32 weights, gradients and optimizer
  state, one bucket as large as the gradients, and the 16-bit activations of all layers for a micro-batch.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.derived import Derived, derive
from pipeline.errors import UserError
from pipeline.model.densenet import create
from pipeline.train.disk_space import checkpoint_bytes, moments
from pipeline.train.mfu import peak_flops

EFFICIENCY = 0.6  # fraction of peak FLOP/s and bandwidth that convolutional networks reach; an assumption
LAUNCH_S = 5e-6  # kernel launch latency; an assumption
HOP_S = 5e-6  # latency from one GPU to the next in a ring; an assumption
CORE_IMG_PER_S = 335.0  # decode and crop on one CPU core: benchmarks/loader.py, originals, AMD EPYC
IMAGENET = (1_281_167, 50_000, 1000, 110_000.0)  # training and evaluation images, classes, mean bytes
_HALF_BYTES, _FULL_BYTES = 2, 4
_CLUSTER = re.compile(r"(?P<nodes>\d+)x(?P<gpus>\d+)x(?P<type>[A-Za-z0-9 ]+)")


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVIDIA's data sheets: bandwidths in one direction, the network's as in NVIDIA's reference systems."""

    bandwidth: float  # bytes/s
    memory: float  # bytes
    link: float  # bytes/s between GPUs of a node
    network: float  # bytes/s per GPU between nodes


GPUS = {
    "B200": Gpu(8.0e12, 180e9, 900e9, 50e9),
    "H200": Gpu(4.8e12, 141e9, 450e9, 50e9),
    "H100": Gpu(3.35e12, 80e9, 450e9, 50e9),
    "A100": Gpu(2.04e12, 80e9, 300e9, 25e9),
    "V100": Gpu(0.9e12, 32e9, 150e9, 12.5e9),
    "L4": Gpu(0.3e12, 24e9, 16e9, 3e9),
}


@dataclass(frozen=True)
class Layer:
    """A layer's forward pass for one image: multiply-adds, values read and written, and values written."""

    multiply_adds: float
    traffic: float
    written: float


@dataclass(frozen=True)
class Estimate:
    """Estimated speed, time and memory of a run.

    Attributes:
        communication: Fraction of a step that the all-reduce takes.
        bottleneck: What takes most of a step.
        total_s: Seconds for all epochs and evaluations.
        read_per_node: Bytes/s of images that a node reads.
        cores_per_node: CPU cores that decode a node's images.
        checkpoint: Bytes of a checkpoint.
        memory: Bytes per GPU, by ZeRO stage.
    """

    nodes: int
    gpu_type: str
    gpu: Gpu
    derived: Derived
    img_per_s: float
    step_s: float
    communication: float
    bottleneck: str
    epoch_s: float
    total_s: float
    read_per_node: float
    cores_per_node: float
    checkpoint: float
    memory: dict[int, float]


def estimate(config: RunConfig, cluster: str, data: tuple[int, int, int, float] = IMAGENET) -> Estimate:
    """Estimates the run on `cluster`, for example `8x8xH100`.

    Args:
        config: The run's config.
        cluster: `NODESxGPUSxTYPE`.
        data: Training and evaluation images, classes, mean bytes per image.

    Raises:
        UserError: The form or GPU type is unknown, or the global batch cannot be divided among the GPUs.
    """
    nodes, gpus, gpu_type = _parse_cluster(cluster)
    train_samples, val_samples, classes, image_bytes = data
    workers, gpu = nodes * gpus, GPUS[gpu_type]
    sizes = {"train_samples": train_samples, "val_samples": val_samples, "num_classes": classes}
    d = derive(config, workers=workers, cpus_per_worker=1, device="cuda", **sizes)
    peak = peak_flops(gpu_type, d.precision)
    assert peak is not None, gpu_type
    layers, parameters = count_layers(config, d.num_classes)
    width = _FULL_BYTES if d.precision == "fp32" else _HALF_BYTES
    forward_s, bottleneck = micro_batch_s(layers, d.device_batch_size, peak, gpu.bandwidth, width)
    compute_s = 3 * forward_s * d.gradient_accumulation_steps
    ring_s = all_reduce_s(_FULL_BYTES * parameters, workers, gpu.link if nodes == 1 else gpu.network)
    step_s = compute_s + ring_s
    img_per_s = d.global_batch_size / step_s
    evaluation_s = val_samples / workers / d.eval_batch_size * forward_s
    epochs, evaluations = config.train.epochs, config.train.epochs / config.eval.every_epochs
    activations = width * sum(layer.written for layer in layers) * d.device_batch_size
    return Estimate(
        nodes=nodes,
        gpu_type=gpu_type,
        gpu=gpu,
        derived=d,
        img_per_s=img_per_s,
        step_s=step_s,
        communication=ring_s / step_s,
        bottleneck="communication" if ring_s > compute_s else bottleneck,
        epoch_s=train_samples / img_per_s,
        total_s=epochs * train_samples / img_per_s + evaluations * evaluation_s,
        read_per_node=img_per_s / nodes * image_bytes,
        cores_per_node=img_per_s / nodes / CORE_IMG_PER_S,
        checkpoint=checkpoint_bytes(config, parameters),
        memory={stage: memory(parameters, moments(config), stage, workers) + activations for stage in range(4)},
    )


def micro_batch_s(layers: list[Layer], batch: int, peak: float, bandwidth: float, width: int) -> tuple[float, str]:
    """Returns the seconds of a forward pass, and the bottleneck of most of them."""
    spent = {"arithmetic": 0.0, "memory traffic": 0.0, "kernel launches": 0.0}
    for layer in layers:
        times = {
            "arithmetic": 2 * layer.multiply_adds * batch / (peak * EFFICIENCY),
            "memory traffic": width * layer.traffic * batch / (bandwidth * EFFICIENCY),
            "kernel launches": LAUNCH_S,
        }
        longest = max(times, key=lambda name: times[name])
        spent[longest] += times[longest]
    return sum(spent.values()), max(spent, key=lambda name: spent[name])


def all_reduce_s(size: float, ranks: int, bandwidth: float) -> float:
    """Returns the seconds of a ring all-reduce of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * HOP_S


def memory(parameters: int, moments_each: int, stage: int, ranks: int) -> float:
    """Returns the bytes per GPU for weights, gradients and optimizer state; the ranks share what the stage shards.

    From stage 1 on DeepSpeed also stores its own fp32 partition of the weights, and a bucket.
    """
    weights = gradients = optimizer = 1.0
    optimizer *= moments_each
    extra = 0.0
    if stage >= 1:
        optimizer, extra = (moments_each + 1) / ranks, 1.0
    if stage >= 2:
        gradients = 1 / ranks
    if stage >= 3:
        weights = 1 / ranks
    return _FULL_BYTES * parameters * (weights + gradients + optimizer + extra)


def count_layers(config: RunConfig, classes: int) -> tuple[list[Layer], int]:
    """Counts the model's layers on a meta tensor; returns them, and the number of parameters."""
    layers: list[Layer] = []

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        read = sum(t.numel() for t in _tensors(inputs))
        written = sum(t.numel() for t in _tensors(output))
        multiply_adds = 0.0
        if isinstance(layer, nn.Conv2d):
            kernel = layer.kernel_size[0] * layer.kernel_size[1]
            multiply_adds = written * layer.in_channels // layer.groups * kernel
        elif isinstance(layer, nn.Linear):
            multiply_adds = written * layer.in_features
        layers.append(Layer(multiply_adds, read + written, written))

    with torch.device("meta"):
        model = create(config.model, classes).eval()
        side = config.data.image_size
        image_1CHW = torch.empty(1, config.model.in_chans, side, side)
    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(image_1CHW)
    return layers, sum(p.numel() for p in model.parameters())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


def scaling(config: RunConfig, cluster: str) -> list[tuple[int, Estimate | None]]:
    """Returns estimates for 1 to 512 GPUs of this type, by their number; None if the batch cannot be divided."""
    _, gpus, gpu_type = _parse_cluster(cluster)
    estimates: list[tuple[int, Estimate | None]] = []
    for workers in (1, 8, 64, 512):
        shape = f"1x{workers}x{gpu_type}" if workers <= gpus else f"{-(-workers // gpus)}x{gpus}x{gpu_type}"
        try:
            result = estimate(config, shape)
        except UserError:
            estimates.append((workers, None))
            continue
        estimates.append((result.derived.workers, result))
    return estimates


def _parse_cluster(cluster: str) -> tuple[int, int, str]:
    match = _CLUSTER.fullmatch(cluster)
    if match is None or not int(match["nodes"]) or not int(match["gpus"]) or match["type"] not in GPUS:
        raise UserError(
            f"--cluster {cluster} is not of the form NODESxGPUSxTYPE, for example 8x8xH100, with a TYPE of "
            f"{', '.join(GPUS)}."
        )
    return int(match["nodes"]), int(match["gpus"]), match["type"]
