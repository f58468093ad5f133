"""Peak FLOP/s by GPU name, and model FLOPs utilization by hand."""

import pytest

from pipeline.config import Model
from pipeline.train.mfu import model_flops_utilization, peak_flops


@pytest.mark.parametrize(
    ("gpu", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-40GB", "fp32", 156),
        ("NVIDIA L40S", "fp16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10G", "bf16", 70),
    ],
)
def test_peaks(gpu, precision, tera):
    assert peak_flops(gpu, precision) == tera * 1e12


def test_a_gpu_that_is_not_listed_has_no_peak():
    assert peak_flops("NVIDIA GeForce GTX 680", "fp32") is None


def test_utilization_of_densenet121():
    """2.834 G multiply-adds at 224 pixels, 1,000 images/s: 17 TFLOP/s."""
    mfu = model_flops_utilization(1000, Model(name="densenet121"), 1000, 224, peak=100e12)
    assert mfu == pytest.approx(6 * 2.834e12 / 100e12, rel=1e-3)
