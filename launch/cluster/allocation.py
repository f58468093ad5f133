"""Resources of a machine or cluster, and their allocation to the workers of a run."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.config import Elastic, RunConfig
from pipeline.config_fields import Device
from pipeline.cuda import has_driver
from pipeline.derived import split_batch
from pipeline.errors import ConfigError


class InsufficientResources(ConfigError):
    """The cluster has too few resources for the run now, and may have more later.

    `reason` is the message without the advice to wait.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}{',' if ': ' in reason else ':'} or wait for more with --wait.")
        self.reason = reason


@dataclass(frozen=True)
class Resources:
    """CPU cores, GPUs and Ray custom resources of a machine or cluster.

    Attributes:
        name: How messages call it: `this machine`, `the cluster at ADDRESS`.
        cpus: Number of CPU cores.
        gpus: Number of GPUs.
        embedded: Whether this run starts a local Ray on them.
        custom: Ray custom resources, `accelerator_type:...` included.
    """

    name: str
    cpus: int
    gpus: int
    embedded: bool
    custom: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """Resources that the workers of a run take, with warnings for the user.

    `workers` is the number of workers that fit now; `bounds` are the fewest and the most that elastic training allows;
    `embedded` is whether this run starts a local Ray.
    """

    device: Device
    workers: int
    bounds: tuple[int, int]
    cpus_per_worker: int
    embedded: bool
    warnings: tuple[str, ...]

    @property
    def total_cpus(self) -> int:
        """CPU cores of all workers together."""
        return self.workers * self.cpus_per_worker

    @property
    def gpus_per_worker(self) -> int:
        """One GPU per worker: NCCL refuses two ranks on the same GPU."""
        return 1 if self.device == "cuda" else 0


def machine_resources() -> Resources:
    """Returns the CPU cores that this process may use, and the CUDA devices that torch finds."""
    devices = 0
    if has_driver():
        import torch

        devices = torch.cuda.device_count()
    return Resources("this machine", len(os.sched_getaffinity(0)), devices, embedded=True)


def allocate(config: RunConfig, available: Resources) -> Allocation:
    """Determines the device, the number of workers and the CPU cores per worker.

    Raises:
        ConfigError: The run needs more resources than there are, for which Ray would wait forever, or the global batch
            cannot be divided among an allowed number of workers.
    """
    device, requested = config.device, config.cluster.workers
    if device == "auto":
        device = "cuda" if available.gpus else "cpu"
    if device == "cuda" and not available.gpus:
        raise _insufficient(
            available, f"device=cuda needs GPUs, and {available.name} has none: set device=auto or device=cpu"
        )
    if isinstance(requested, Elastic):
        _check_elastic_batches(config, requested)
        fitting = _fitting_workers(config, available, device)
        if fitting < requested.min:
            raise _insufficient(
                available,
                f"cluster.workers={{min: {requested.min}, max: {requested.max}}}: {available.name} has resources for "
                f"{fitting}: set a smaller min",
            )
        workers = min(fitting, requested.max) // requested.step * requested.step
        bounds = (requested.min, requested.max)
    else:
        workers = requested if requested != "auto" else available.gpus if device == "cuda" else 1
        bounds = (workers, workers)
    if device == "cuda" and workers > available.gpus:
        raise _insufficient(
            available,
            f"cluster.workers={workers} needs {workers} GPUs, and {available.name} has {available.gpus}"
            f"{_smaller_workers(config, available.gpus)}",
        )
    cpus = _cpus_per_worker(config, available, bounds[1])
    warnings = []
    if workers * cpus > available.cpus:
        shortage = (
            f"{workers} workers with {cpus} CPU cores each need {workers * cpus}, {available.name} has {available.cpus}"
        )
        if not available.embedded:
            raise _insufficient(
                available, f"{shortage}: set fewer cluster.workers or a smaller cluster.cpus_per_worker"
            )
        warnings.append(f"{shortage}: the workers share the cores and are slower.")
    for name, amount in config.cluster.resources.items():
        has = available.custom.get(name, 0)
        if workers * amount > has:
            raise _insufficient(
                available,
                f"cluster.resources: {workers} workers with {amount:g} {name} each need {workers * amount:g}, "
                f"{available.name} has {has:g}: change it",
            )
    accelerator = config.cluster.accelerator_type
    if accelerator is not None and f"accelerator_type:{accelerator}" not in available.custom:
        accelerators = [name.split(":")[1] for name in available.custom if name.startswith("accelerator_type:")]
        raise _insufficient(
            available,
            f"cluster.accelerator_type={accelerator}: {available.name} has "
            f"{', '.join(accelerators) or 'none that Ray knows'}: change it",
        )
    return Allocation(device, workers, bounds, cpus, available.embedded, tuple(warnings))


def _cpus_per_worker(config: RunConfig, available: Resources, workers: int) -> int:
    cpus = config.cluster.cpus_per_worker
    return max(1, available.cpus // workers) if cpus == "auto" else cpus


def _fitting_workers(config: RunConfig, available: Resources, device: Device) -> int:
    """Returns the number of workers that the CPU cores, and on CUDA the GPUs, allow."""
    cpus = config.cluster.cpus_per_worker
    by_cores = available.cpus // (1 if cpus == "auto" else cpus)
    return min(by_cores, available.gpus) if device == "cuda" else by_cores


def _check_elastic_batches(config: RunConfig, requested: Elastic) -> None:
    """Raises `ConfigError` if an allowed number of workers does not divide the global batch."""
    for workers in range(requested.min, requested.max + 1, requested.step):
        try:
            split_batch(config, workers)
        except ConfigError as error:
            raise ConfigError(
                f"cluster.workers={{min: {requested.min}, max: {requested.max}}} allows {workers} workers: {error}"
            ) from error


def _smaller_workers(config: RunConfig, gpus: int) -> str:
    """Returns the advice to use the most workers that `gpus` allow, or an empty string."""
    for workers in range(gpus, 0, -1):
        try:
            _, accumulation = split_batch(config, workers)
        except ConfigError:
            continue
        return (
            f": set cluster.workers={workers} (gradient accumulation becomes {accumulation}, the global batch stays "
            f"{config.train.global_batch_size})"
        )
    return ""


def _insufficient(available: Resources, reason: str) -> ConfigError:
    if available.embedded:
        return ConfigError(f"{reason}.")
    return InsufficientResources(reason)
