"""Model FLOPs utilization (MFU): the fraction of a GPU's peak FLOP/s that training uses."""

from pipeline.config import Model
from pipeline.config_fields import Precision
from pipeline.model.timm_models import size

# NVIDIA's data sheets, TFLOP/s of dense matrices: fp16 or bf16, and what fp32 convolutions use by default in PyTorch
# (TF32 where the GPU has it). The first name that the GPU's name contains applies.
_PEAKS = {
    "B200": (2250, 1125),
    "H200": (989, 494),
    "H100 PCIe": (756, 378),
    "H100": (989, 494),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L4": (121, 60),
    "A10G": (70, 35),
    "A10": (125, 62),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}


def peak_flops(gpu: str, precision: Precision) -> float | None:
    """Returns a GPU's peak in FLOP/s, by its CUDA device name; None for GPUs that are not listed."""
    found = next((peaks for name, peaks in _PEAKS.items() if name in gpu), None)
    return None if found is None else 1e12 * found[precision == "fp32"]


def model_flops_utilization(img_per_s: float, model: Model, num_classes: int, side: int, peak: float) -> float:
    """Returns one device's model FLOPs utilization in [0, 1] (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    Forward and backward pass together cost three times the forward pass, and a multiply-add counts as two operations.
    What activation checkpointing (`model.memory`) recomputes does not count. `peak` is in FLOP/s.
    """
    return img_per_s * 6 * size(model, num_classes, side).multiply_adds / peak
