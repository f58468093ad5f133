"""Performance estimates, compared with calculations by hand."""

import pytest

from launch.run.estimate import (
    EFFICIENCY,
    HOP_S,
    LAUNCH_S,
    Layer,
    all_reduce_s,
    count_layers,
    estimate,
    memory,
    micro_batch_s,
)
from pipeline.config import RunConfig
from pipeline.errors import UserError


def config(**train: object) -> RunConfig:
    return RunConfig.model_validate({"train": {"epochs": 90} | train, "schedule": {"milestones": [30, 60]}})


def test_each_layer_takes_the_longest_of_arithmetic_traffic_and_launch():
    layers = [Layer(1e9, 1e3, 1e3), Layer(1e3, 1e8, 1e3), Layer(1, 1, 1)]
    seconds, bottleneck = micro_batch_s(layers, batch=10, peak=1e15, bandwidth=1e12, width=2)
    arithmetic, traffic = 2 * 1e9 * 10 / (1e15 * EFFICIENCY), 2 * 1e8 * 10 / (1e12 * EFFICIENCY)
    assert seconds == pytest.approx(arithmetic + traffic + LAUNCH_S)
    assert bottleneck == "memory traffic"


def test_the_all_reduce_of_a_ring():
    assert all_reduce_s(1e9, 4, 1e10) == pytest.approx(2 * 3 / 4 * 0.1 + 6 * HOP_S)
    assert all_reduce_s(1e9, 1, 1e10) == 0


def test_memory_of_each_zero_stage():
    """SGD with momentum, a million weights, ten ranks; in copies of the weights."""
    copies = [memory(1_000_000, 1, stage, 10) / 4e6 for stage in range(4)]
    assert copies == pytest.approx([3, 3.2, 2.3, 1.4])


def test_layers_and_parameters_are_those_of_the_paper():
    layers, parameters = count_layers(config(), 1000)
    assert parameters == 7_978_856
    assert sum(layer.multiply_adds for layer in layers) == pytest.approx(2.834e9, rel=1e-3)


def test_an_estimate_is_consistent():
    e = estimate(config(global_batch_size=1024), "2x8xA100")
    assert (e.derived.workers, e.derived.device_batch_size, e.derived.gradient_accumulation_steps) == (16, 64, 1)
    assert e.img_per_s == pytest.approx(1024 / e.step_s)
    assert e.epoch_s == pytest.approx(1_281_167 / e.img_per_s)
    assert e.total_s > 90 * e.epoch_s
    assert e.read_per_node == pytest.approx(e.img_per_s / 2 * 110_000)
    assert 0 < e.communication < 1
    assert e.checkpoint == 2 * 4 * 7_978_856
    one = estimate(config(global_batch_size=1024), "1x1xA100")
    assert one.communication == 0
    assert one.img_per_s * 16 > e.img_per_s


@pytest.mark.parametrize("cluster", ["8", "0x8xH100", "8x8xTPU", "8x8", "axbxH100"])
def test_unknown_clusters_are_refused(cluster):
    with pytest.raises(UserError, match=f"--cluster {cluster} is not of the form NODESxGPUSxTYPE"):
        estimate(config(), cluster)
