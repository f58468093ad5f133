"""System metrics of the driver's node by MLflow's monitors: CPU, memory, disk, network, GPU."""

import time
from contextlib import suppress

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

_INTERVAL_S = 10.0


class SystemMetrics:
    """Samples the system metrics of this node, at most every ten seconds."""

    def __init__(self) -> None:
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # no GPU, or no driver
            self._monitors.append(GPUMonitor())
        self._last_read_s = -_INTERVAL_S

    def read(self) -> dict[str, float]:
        """Returns metrics under MLflow's names (`system/*`); empty if less than ten seconds passed since the last."""
        now = time.monotonic()
        if now - self._last_read_s < _INTERVAL_S:
            return {}
        self._last_read_s = now
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": float(value) for name, value in values.items()}
