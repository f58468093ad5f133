"""What a run would take on a cluster that is not here, NODESxGPUSxTYPE, on paper.

A small model, in the order in which it is applied:

- Each layer takes the larger of its arithmetic over the GPU's peak and its memory traffic over the GPU's bandwidth
  (the roofline model, Williams et al. 2009), both times `REACHED`; a backward pass takes twice the forward pass.
- A micro-batch takes at least `LAUNCH_S` for each layer and pass, which is what bounds small batches.
- Gradients go round in rings: 2 (n - 1) / n of their bytes over the slowest link, and 2 (n - 1) hops (Thakur et al.
  2005). They are not overlapped with the backward pass, as DeepSpeed's ZeRO 1 does not.
- Memory is what the paper of ZeRO says (Rajbhandari et al. 2020, arXiv 1910.02054) for fp32 weights, gradients and
  optimizer, one bucket as large as the gradients, and every layer's output in half precision for a device batch.
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

REACHED = 0.6  # share of peak and bandwidth that convolution models reach; an assumption
LAUNCH_S = 5e-6  # from one kernel's start to the next; an assumption
HOP_S = 5e-6  # from one GPU to the next in a ring; an assumption
CORE_IMG_PER_S = 335.0  # decoded and cropped by one CPU core: benchmarks/loader.py, originals, AMD EPYC
IMAGENET = (1_281_167, 50_000, 1000, 110_000.0)  # training and evaluation images, classes, mean bytes
_HALF_BYTES, _FULL_BYTES = 2, 4
_FORM = re.compile(r"(?P<nodes>\d+)x(?P<gpus>\d+)x(?P<kind>[A-Za-z0-9 ]+)")


@dataclass(frozen=True)
class Gpu:
    """NVIDIA's data sheets; links in one direction, the network's as in NVIDIA's reference systems."""

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
    """One layer's forward pass for one image: multiply-adds, and numbers read and written."""

    multiply_adds: float
    moved: float
    written: float


@dataclass(frozen=True)
class Estimate:
    """Seconds, bytes and images per second; `share` is that of communication in a step."""

    nodes: int
    kind: str
    gpu: Gpu
    derived: Derived
    img_per_s: float
    step_s: float
    share: float
    bound: str
    epoch_s: float
    total_s: float
    read_per_node: float
    cores_per_node: float
    checkpoint: float
    memory: dict[int, float]


def estimate(config: RunConfig, cluster: str, data: tuple[int, int, int, float] = IMAGENET) -> Estimate:
    """What the run takes on `cluster`, as `8x8xH100`.

    Raises:
        UserError: no such cluster can be estimated, or the batch cannot be split among its GPUs.
    """
    nodes, gpus, kind = _parse(cluster)
    train_samples, val_samples, classes, image_bytes = data
    workers, gpu = nodes * gpus, GPUS[kind]
    sizes = {"train_samples": train_samples, "val_samples": val_samples, "num_classes": classes}
    d = derive(config, workers=workers, cpus_per_worker=1, device="cuda", **sizes)
    peak = peak_flops(kind, d.precision)
    assert peak is not None, kind
    layers, parameters = layers_of(config, d.num_classes)
    width = _FULL_BYTES if d.precision == "fp32" else _HALF_BYTES
    forward_s, bound = micro_batch_s(layers, d.device_batch_size, peak, gpu.bandwidth, width)
    compute_s = 3 * forward_s * d.gradient_accumulation_steps
    ring_s = all_reduce_s(_FULL_BYTES * parameters, workers, gpu.link if nodes == 1 else gpu.network)
    step_s = compute_s + ring_s
    img_per_s = d.global_batch_size / step_s
    evaluated = val_samples / workers / d.eval_batch_size * forward_s
    epochs, evaluations = config.train.epochs, config.train.epochs / config.eval.every_epochs
    activations = width * sum(layer.written for layer in layers) * d.device_batch_size
    return Estimate(
        nodes=nodes,
        kind=kind,
        gpu=gpu,
        derived=d,
        img_per_s=img_per_s,
        step_s=step_s,
        share=ring_s / step_s,
        bound="communication" if ring_s > compute_s else bound,
        epoch_s=train_samples / img_per_s,
        total_s=epochs * train_samples / img_per_s + evaluations * evaluated,
        read_per_node=img_per_s / nodes * image_bytes,
        cores_per_node=img_per_s / nodes / CORE_IMG_PER_S,
        checkpoint=checkpoint_bytes(config, parameters),
        memory={stage: memory(parameters, moments(config), stage, workers) + activations for stage in range(4)},
    )


def micro_batch_s(layers: list[Layer], batch: int, peak: float, bandwidth: float, width: int) -> tuple[float, str]:
    """Seconds of a forward pass, and what bounds most of it."""
    spent = {"arithmetic": 0.0, "memory traffic": 0.0, "kernel launches": 0.0}
    for layer in layers:
        times = {
            "arithmetic": 2 * layer.multiply_adds * batch / (peak * REACHED),
            "memory traffic": width * layer.moved * batch / (bandwidth * REACHED),
            "kernel launches": LAUNCH_S,
        }
        longest = max(times, key=lambda name: times[name])
        spent[longest] += times[longest]
    return sum(spent.values()), max(spent, key=lambda name: spent[name])


def all_reduce_s(size: float, ranks: int, bandwidth: float) -> float:
    """Seconds to sum `size` bytes over a ring of ranks."""
    return 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * HOP_S


def memory(parameters: int, moments_each: int, stage: int, ranks: int) -> float:
    """Bytes per device for weights, gradients and the optimizer; what a stage shards is divided by the ranks.

    From stage 1 on DeepSpeed keeps an fp32 part of its own to step, and a bucket.
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


def layers_of(config: RunConfig, classes: int) -> tuple[list[Layer], int]:
    """The model's layers, counted on an image without data, and its number of parameters."""
    found: list[Layer] = []

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        read = sum(t.numel() for t in _tensors(inputs))
        written = sum(t.numel() for t in _tensors(output))
        work = 0.0
        if isinstance(layer, nn.Conv2d):
            work = written * layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        elif isinstance(layer, nn.Linear):
            work = written * layer.in_features
        found.append(Layer(work, read + written, written))

    with torch.device("meta"):
        model = create(config.model, classes).eval()
        side = config.data.image_size
        image_1CHW = torch.empty(1, config.model.in_chans, side, side)
    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(image_1CHW)
    return found, sum(p.numel() for p in model.parameters())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


def scaling(config: RunConfig, cluster: str) -> list[tuple[int, Estimate | None]]:
    """Estimates for smaller and larger clusters of this kind, by GPUs; None where the batch cannot be split."""
    _, gpus, kind = _parse(cluster)
    found: list[tuple[int, Estimate | None]] = []
    for workers in (1, 8, 64, 512):
        shape = f"1x{workers}x{kind}" if workers <= gpus else f"{-(-workers // gpus)}x{gpus}x{kind}"
        try:
            of = estimate(config, shape)
        except UserError:
            found.append((workers, None))
            continue
        found.append((of.derived.workers, of))
    return found


def _parse(cluster: str) -> tuple[int, int, str]:
    form = _FORM.fullmatch(cluster)
    if form is None or not int(form["nodes"]) or not int(form["gpus"]) or form["kind"] not in GPUS:
        raise UserError(
            f"--cluster {cluster} is not of the form NODESxGPUSxTYPE, as 8x8xH100; the types are {', '.join(GPUS)}."
        )
    return int(form["nodes"]), int(form["gpus"]), form["kind"]
