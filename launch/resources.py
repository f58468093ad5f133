"""What the machine or the cluster offers, and what a run takes of it."""

import os
from dataclasses import dataclass

from pipeline.config import Device, RunConfig
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Resources:
    """CPU cores and GPUs of `where`; `embedded` when the Ray that offers them is started by this run."""

    where: str
    cpus: int
    gpus: int
    embedded: bool


@dataclass(frozen=True)
class Share:
    """What the workers of a run take, and what the user should know about it."""

    device: Device
    workers: int
    cpus_per_worker: int
    warnings: tuple[str, ...]

    @property
    def gpus_per_worker(self) -> int:
        return 1 if self.device == "cuda" else 0


def this_machine() -> Resources:
    """The cores that this process may use, and the CUDA devices that torch sees."""
    import torch

    return Resources("this machine", len(os.sched_getaffinity(0)), torch.cuda.device_count(), embedded=True)


def share(config: RunConfig, offered: Resources) -> Share:
    """Settles device, workers and cores.

    Raises:
        ConfigError: more is asked for than there is, which Ray would wait for without end.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if offered.gpus else "cpu"
    if device == "cuda" and not offered.gpus:
        raise ConfigError(f"device=cuda needs GPUs, and {offered.where} has none: set device=auto or device=cpu.")
    default_workers = offered.gpus if device == "cuda" else 1
    workers = default_workers if config.cluster.workers == "auto" else config.cluster.workers
    if device == "cuda" and workers > offered.gpus:
        raise ConfigError(
            f"cluster.workers={workers} needs {workers} GPUs, and {offered.where} has {offered.gpus}: "
            f"set cluster.workers={offered.gpus}."
        )
    fair_cpus = max(1, offered.cpus // workers)
    cpus = fair_cpus if config.cluster.cpus_per_worker == "auto" else config.cluster.cpus_per_worker
    warnings = []
    if workers * cpus > offered.cpus:
        needs = (
            f"{workers} workers with {cpus} CPU cores each need {workers * cpus}, {offered.where} has {offered.cpus}"
        )
        if not offered.embedded:
            raise ConfigError(f"{needs}: set fewer cluster.workers or a smaller cluster.cpus_per_worker.")
        warnings.append(f"{needs}: they will share the cores and be slower.")
    return Share(device, workers, cpus, tuple(warnings))
