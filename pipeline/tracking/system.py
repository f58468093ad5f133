"""Use of the driver's node, by MLflow's own monitors: cores, memory, disk, network, GPUs."""

import time
from contextlib import suppress

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

_EVERY_S = 10.0


class SystemMetrics:
    """Reads the node's use, at most every ten seconds."""

    def __init__(self) -> None:
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # there is no GPU, or no driver of it
            self._monitors.append(GPUMonitor())
        self._read_at = -_EVERY_S

    def read(self) -> dict[str, float]:
        """Metrics by the names that MLflow's own system metrics have; none where the last ones are recent."""
        now = time.monotonic()
        if now - self._read_at < _EVERY_S:
            return {}
        self._read_at = now
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": float(value) for name, value in found.items()}
