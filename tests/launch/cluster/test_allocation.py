"""What a run takes of what there is."""

import pytest

from launch.cluster.allocation import Resources, allocate
from pipeline.config import RunConfig
from pipeline.errors import ConfigError


def config(**tree: object) -> RunConfig:
    return RunConfig.model_validate(tree)


def machine(cpus: int, gpus: int, embedded: bool = False) -> Resources:
    return Resources("the cluster", cpus, gpus, embedded)


def test_auto_is_one_worker_per_gpu_with_a_fair_share_of_the_cores():
    taken = allocate(config(), machine(64, 8))
    assert (taken.device, taken.workers, taken.cpus_per_worker, taken.gpus_per_worker) == ("cuda", 8, 8, 1)


def test_auto_without_gpus_is_one_worker_with_all_cores():
    taken = allocate(config(), machine(6, 0))
    assert (taken.device, taken.workers, taken.cpus_per_worker, taken.gpus_per_worker) == ("cpu", 1, 6, 0)


def test_gpus_are_left_alone_when_the_cpu_is_asked_for():
    assert allocate(config(device="cpu", cluster={"workers": 2}), machine(8, 4)).gpus_per_worker == 0


def test_more_gpus_than_there_are_is_refused_with_both_numbers():
    wanted = config(cluster={"workers": 16}, train={"global_batch_size": 1024})
    with pytest.raises(ConfigError) as error:
        allocate(wanted, machine(64, 8))
    assert str(error.value) == (
        "cluster.workers=16 needs 16 GPUs, and the cluster has 8: set cluster.workers=8 (accumulation becomes 2, the "
        "global batch stays 1024), or wait for more with --wait."
    )
    with pytest.raises(ConfigError, match="device=cuda needs GPUs, and the cluster has none"):
        allocate(config(device="cuda"), machine(64, 0))


def test_more_cores_than_there_are_is_refused_on_a_cluster_and_a_warning_on_a_ray_of_ones_own():
    wanted = config(cluster={"workers": 4})
    with pytest.raises(ConfigError, match="4 workers with 1 CPU cores each need 4, the cluster has 2"):
        allocate(wanted, machine(2, 0))
    (warning,) = allocate(wanted, machine(2, 0, embedded=True)).warnings
    assert "they will share the cores" in warning


def test_elastic_workers_are_as_many_as_there_is_room_for():
    wanted = config(cluster={"workers": {"min": 2, "max": 8}, "cpus_per_worker": 2}, train={"global_batch_size": 840})
    assert (allocate(wanted, machine(64, 4)).workers, allocate(wanted, machine(64, 4)).bounds) == (4, (2, 8))
    assert allocate(wanted, machine(6, 4)).workers == 3
    assert allocate(wanted, machine(64, 0)).workers == 8
    with pytest.raises(ConfigError, match=r"the cluster has room for 1: set a smaller min, or wait .* with --wait"):
        allocate(wanted, machine(64, 1))
    odd = config(cluster={"workers": {"min": 2, "max": 4}}, train={"global_batch_size": 64})
    with pytest.raises(ConfigError, match=r"max: 4} allows 3 workers: train.global_batch_size=64 cannot be divided"):
        allocate(odd, machine(64, 8))


def test_further_resources_and_gpu_models_are_looked_for():
    offered = Resources("the cluster", 64, 8, False, {"fast": 2.0, "accelerator_type:A100": 1.0})
    with pytest.raises(ConfigError, match=r"cluster.resources: 8 workers with 1 fast each need 8, the cluster has 2"):
        allocate(config(cluster={"resources": {"fast": 1}}), offered)
    assert allocate(config(cluster={"resources": {"fast": 0.25}, "accelerator_type": "A100"}), offered).workers == 8
    with pytest.raises(ConfigError, match="cluster.accelerator_type=H100: the cluster has A100"):
        allocate(config(cluster={"accelerator_type": "H100"}), offered)
