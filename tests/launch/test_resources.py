"""What a run takes of what there is."""

import pytest

from launch.resources import Resources, share
from pipeline.config import RunConfig
from pipeline.errors import ConfigError


def config(**tree: object) -> RunConfig:
    return RunConfig.model_validate(tree)


def machine(cpus: int, gpus: int, embedded: bool = False) -> Resources:
    return Resources("the cluster", cpus, gpus, embedded)


def test_auto_is_one_worker_per_gpu_with_a_fair_share_of_the_cores():
    taken = share(config(), machine(64, 8))
    assert (taken.device, taken.workers, taken.cpus_per_worker, taken.gpus_per_worker) == ("cuda", 8, 8, 1)


def test_auto_without_gpus_is_one_worker_with_all_cores():
    taken = share(config(), machine(6, 0))
    assert (taken.device, taken.workers, taken.cpus_per_worker, taken.gpus_per_worker) == ("cpu", 1, 6, 0)


def test_gpus_are_left_alone_when_the_cpu_is_asked_for():
    assert share(config(device="cpu", cluster={"workers": 2}), machine(8, 4)).gpus_per_worker == 0


def test_more_gpus_than_there_are_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"needs 16 GPUs, and the cluster has 8: set cluster.workers=8"):
        share(config(cluster={"workers": 16}), machine(64, 8))
    with pytest.raises(ConfigError, match="device=cuda needs GPUs, and the cluster has none"):
        share(config(device="cuda"), machine(64, 0))


def test_more_cores_than_there_are_is_refused_on_a_cluster_and_a_warning_on_a_ray_of_ones_own():
    wanted = config(cluster={"workers": 4})
    with pytest.raises(ConfigError, match="4 workers with 1 CPU cores each need 4, the cluster has 2"):
        share(wanted, machine(2, 0))
    (warning,) = share(wanted, machine(2, 0, embedded=True)).warnings
    assert "they will share the cores" in warning
