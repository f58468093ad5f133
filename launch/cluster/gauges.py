"""Training metrics as Ray gauges, which Prometheus collects from every node."""

from ray.util.metrics import Gauge

from pipeline.train.events import Event, Step

_GAUGES = {
    "loss": "mean training loss since the last log line",
    "img_per_s": "training images per second, all workers",
    "step_s": "seconds per optimizer step",
    "data_wait": "fraction of the time that the slowest worker waited for data",
    "gpu_memory_gb": "peak GPU memory so far on rank 0, GB",
    "samples_seen": "training images since the start of the run",
}


class Gauges:
    """Sets the gauges `densenet_*` from the events of rank 0."""

    def __init__(self, run_name: str) -> None:
        self._gauges = {name: Gauge(f"densenet_{name}", text, tag_keys=("run",)) for name, text in _GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run_name})

    def set(self, event: Event) -> None:
        """Sets the gauges from a `Step` event; ignores other events."""
        if isinstance(event, Step):
            for name, gauge in self._gauges.items():
                value = getattr(event, name)
                if value is not None:
                    gauge.set(value)
