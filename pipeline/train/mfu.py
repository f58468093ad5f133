"""The share of a GPU's peak arithmetic that training uses."""

from pipeline.config import Model, Precision
from pipeline.model.timm_models import size

# NVIDIA's data sheets, TFLOP/s of dense matrices: fp16 or bf16, and what fp32 convolutions use by default in PyTorch
# (TF32 where there is one). The first name that the GPU's name contains counts.
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
    """A GPU's peak, FLOP/s, by the name that CUDA gives it; None for one that is not in the list."""
    found = next((peaks for name, peaks in _PEAKS.items() if name in gpu), None)
    return None if found is None else 1e12 * found[precision == "fp32"]


def utilization(img_per_s: float, model: Model, num_classes: int, side: int, peak: float) -> float:
    """Model FLOPs utilization of one device (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    Forward and backward pass of an image are three times the forward pass, a multiply-add is two operations; what
    `model.memory` computes anew does not count.
    """
    return img_per_s * 6 * size(model, num_classes, side).multiply_adds / peak
