"""The graph of DALI's pipeline on the GPU, built but not run: no GPU is needed."""

from collections.abc import Iterator
from typing import Any

import pytest
from nvidia.dali import types

from pipeline.data.dali import _full_pipeline


def operators(auto_augment: str, num_ops: int) -> Iterator[tuple[str, str, set[str]]]:
    """Yields each operator's name, device and the devices of its inputs; the last one returns the images."""
    pipeline: Any = _full_pipeline(
        source=lambda: None,
        decoder="mixed",
        interpolation=types.INTERP_CUBIC,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        auto_augment=auto_augment,
        num_ops=num_ops,
        batch_size=4,
        num_threads=1,
        device_id=0,
        prefetch_queue_depth=2,
    )
    pipeline._build_graph()
    assert [output.device for output in pipeline._graph_outputs] == ["gpu"]
    for operator in pipeline._ops:
        yield type(operator._op).__name__, operator._op.device, {node.device for node in operator.inputs}


@pytest.mark.parametrize(("auto_augment", "num_ops"), [("none", 0), ("randaugment", 2), ("trivialaugment", 1)])
def test_images_stay_on_the_gpu_after_mixed_decoding(auto_augment, num_ops):
    found = list(operators(auto_augment, num_ops))
    assert [name for name, device, _ in found if device == "mixed"] == ["ImageSlice"]
    assert not [name for name, device, inputs in found if device == "cpu" and "gpu" in inputs]
    devices = {name: device for name, device, _ in found}
    assert devices["Resize"] == devices["CropMirrorNormalize"] == "gpu"
