"""What the machine or the cluster offers, and what a run takes of it."""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.config import Device, Elastic, RunConfig
from pipeline.derived import split_batch
from pipeline.errors import ConfigError


class InsufficientResources(ConfigError):
    """A cluster has too little for the run now, and may have more later; `why` is without the advice to wait."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}{',' if ': ' in why else ':'} or wait for more with --wait.")
        self.why = why


@dataclass(frozen=True)
class Resources:
    """CPU cores, GPUs and Ray's further resources of `where`; `embedded` when this run starts the Ray that has them."""

    where: str
    cpus: int
    gpus: int
    embedded: bool
    further: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """What the workers of a run take, and what the user should know about it.

    `workers` is how many there is room for now; `bounds` says how few and how many there may be later.
    """

    device: Device
    workers: int
    bounds: tuple[int, int]
    cpus_per_worker: int
    warnings: tuple[str, ...]

    @property
    def gpus_per_worker(self) -> int:
        """One GPU each: NCCL refuses two ranks on the same one."""
        return 1 if self.device == "cuda" else 0


def this_machine() -> Resources:
    """The cores that this process may use, and the CUDA devices that torch sees."""
    devices = 0
    try:
        ctypes.CDLL("libcuda.so.1")  # the driver's library, which torch opens too: without it there is no CUDA device
    except OSError:
        pass
    else:
        import torch  # takes seconds, so only where there may be one

        devices = torch.cuda.device_count()
    return Resources("this machine", len(os.sched_getaffinity(0)), devices, embedded=True)


def allocate(config: RunConfig, offered: Resources) -> Allocation:
    """Settles device, workers and cores.

    Raises:
        ConfigError: more is asked for than there is, which Ray would wait for without end, or the global batch cannot
            be split among some allowed number of workers.
    """
    device, wanted = config.device, config.cluster.workers
    if device == "auto":
        device = "cuda" if offered.gpus else "cpu"
    if device == "cuda" and not offered.gpus:
        raise _insufficient(
            offered, f"device=cuda needs GPUs, and {offered.where} has none: set device=auto or device=cpu"
        )
    if isinstance(wanted, Elastic):
        _check_each(config, wanted)
        room = _room(config, offered, device)
        if room < wanted.min:
            raise _insufficient(
                offered,
                f"cluster.workers={{min: {wanted.min}, max: {wanted.max}}}: {offered.where} has room for {room}: set a "
                f"smaller min",
            )
        workers, bounds = min(room, wanted.max) // wanted.step * wanted.step, (wanted.min, wanted.max)
    else:
        workers = wanted if wanted != "auto" else offered.gpus if device == "cuda" else 1
        bounds = (workers, workers)
    if device == "cuda" and workers > offered.gpus:
        raise _insufficient(
            offered,
            f"cluster.workers={workers} needs {workers} GPUs, and {offered.where} has {offered.gpus}"
            f"{_fewer(config, offered.gpus)}",
        )
    cpus = _cpus_per_worker(config, offered, bounds[1])
    warnings = []
    if workers * cpus > offered.cpus:
        needs = (
            f"{workers} workers with {cpus} CPU cores each need {workers * cpus}, {offered.where} has {offered.cpus}"
        )
        if not offered.embedded:
            raise _insufficient(offered, f"{needs}: set fewer cluster.workers or a smaller cluster.cpus_per_worker")
        warnings.append(f"{needs}: they will share the cores and be slower.")
    for name, amount in config.cluster.resources.items():
        has = offered.further.get(name, 0)
        if workers * amount > has:
            raise _insufficient(
                offered,
                f"cluster.resources: {workers} workers with {amount:g} {name} each need {workers * amount:g}, "
                f"{offered.where} has {has:g}: change it",
            )
    kind = config.cluster.accelerator_type
    if kind is not None and f"accelerator_type:{kind}" not in offered.further:
        kinds = [name.split(":")[1] for name in offered.further if name.startswith("accelerator_type:")]
        raise _insufficient(
            offered,
            f"cluster.accelerator_type={kind}: {offered.where} has {', '.join(kinds) or 'none that Ray knows'}: change "
            f"it",
        )
    return Allocation(device, workers, bounds, cpus, tuple(warnings))


def _cpus_per_worker(config: RunConfig, offered: Resources, workers: int) -> int:
    asked = config.cluster.cpus_per_worker
    return max(1, offered.cpus // workers) if asked == "auto" else asked


def _room(config: RunConfig, offered: Resources, device: Device) -> int:
    """The workers that fit now."""
    asked = config.cluster.cpus_per_worker
    by_cores = offered.cpus // (1 if asked == "auto" else asked)
    return min(by_cores, offered.gpus) if device == "cuda" else by_cores


def _check_each(config: RunConfig, wanted: Elastic) -> None:
    """Raises where the global batch cannot be split among some number of workers within the bounds."""
    for workers in range(wanted.min, wanted.max + 1, wanted.step):
        try:
            split_batch(config, workers)
        except ConfigError as error:
            raise ConfigError(
                f"cluster.workers={{min: {wanted.min}, max: {wanted.max}}} allows {workers} workers: {error}"
            ) from error


def _fewer(config: RunConfig, most: int) -> str:
    """Advice for a cluster with fewer GPUs than asked for, if there is any."""
    for workers in range(most, 0, -1):
        try:
            _, accumulation = split_batch(config, workers)
        except ConfigError:
            continue
        return (
            f": set cluster.workers={workers} (accumulation becomes {accumulation}, the global batch stays "
            f"{config.train.global_batch_size})"
        )
    return ""


def _insufficient(offered: Resources, why: str) -> ConfigError:
    if offered.embedded:
        return ConfigError(f"{why}.")
    return InsufficientResources(why)
