"""Allocation of resources to workers."""

import pytest

from launch.cluster.allocation import Resources, allocate
from pipeline.config import RunConfig
from pipeline.errors import ConfigError


def config(**tree: object) -> RunConfig:
    return RunConfig.model_validate(tree)


def machine(cpus: int, gpus: int, embedded: bool = False) -> Resources:
    return Resources("the cluster", cpus, gpus, embedded)


def test_auto_is_one_worker_per_gpu_with_an_equal_part_of_the_cores():
    allocation = allocate(config(), machine(64, 8))
    assert (allocation.device, allocation.workers, allocation.cpus_per_worker, allocation.gpus_per_worker) == (
        "cuda",
        8,
        8,
        1,
    )


def test_auto_without_gpus_is_one_worker_with_all_cores():
    allocation = allocate(config(), machine(6, 0))
    assert (allocation.device, allocation.workers, allocation.cpus_per_worker, allocation.gpus_per_worker) == (
        "cpu",
        1,
        6,
        0,
    )


def test_device_cpu_takes_no_gpus():
    assert allocate(config(device="cpu", cluster={"workers": 2}), machine(8, 4)).gpus_per_worker == 0


def test_too_few_gpus_raise_an_error_with_both_numbers():
    requested = config(cluster={"workers": 16}, train={"global_batch_size": 1024})
    with pytest.raises(ConfigError) as error:
        allocate(requested, machine(64, 8))
    assert str(error.value) == (
        "cluster.workers=16 needs 16 GPUs, and the cluster has 8: set cluster.workers=8 (gradient accumulation becomes "
        "2, the global batch stays 1024), or wait for more with --wait."
    )
    with pytest.raises(ConfigError, match="device=cuda needs GPUs, and the cluster has none"):
        allocate(config(device="cuda"), machine(64, 0))


def test_too_few_cores_are_an_error_on_a_cluster_and_a_warning_on_an_embedded_ray():
    requested = config(cluster={"workers": 4})
    with pytest.raises(ConfigError, match="4 workers with 1 CPU cores each need 4, the cluster has 2"):
        allocate(requested, machine(2, 0))
    (warning,) = allocate(requested, machine(2, 0, embedded=True)).warnings
    assert "the workers share the cores" in warning


def test_elastic_workers_are_as_many_as_the_resources_allow():
    requested = config(
        cluster={"workers": {"min": 2, "max": 8}, "cpus_per_worker": 2}, train={"global_batch_size": 840}
    )
    assert (allocate(requested, machine(64, 4)).workers, allocate(requested, machine(64, 4)).bounds) == (4, (2, 8))
    assert allocate(requested, machine(6, 4)).workers == 3
    assert allocate(requested, machine(64, 0)).workers == 8
    with pytest.raises(
        ConfigError, match=r"the cluster has resources for 1: set a smaller min, or wait .* with --wait"
    ):
        allocate(requested, machine(64, 1))
    indivisible = config(cluster={"workers": {"min": 2, "max": 4}}, train={"global_batch_size": 64})
    with pytest.raises(ConfigError, match=r"max: 4} allows 3 workers: train.global_batch_size=64 cannot be divided"):
        allocate(indivisible, machine(64, 8))


def test_custom_resources_and_accelerator_types_are_checked():
    available = Resources("the cluster", 64, 8, False, {"fast": 2.0, "accelerator_type:A100": 1.0})
    with pytest.raises(ConfigError, match=r"cluster.resources: 8 workers with 1 fast each need 8, the cluster has 2"):
        allocate(config(cluster={"resources": {"fast": 1}}), available)
    assert allocate(config(cluster={"resources": {"fast": 0.25}, "accelerator_type": "A100"}), available).workers == 8
    with pytest.raises(ConfigError, match="cluster.accelerator_type=H100: the cluster has A100"):
        allocate(config(cluster={"accelerator_type": "H100"}), available)
