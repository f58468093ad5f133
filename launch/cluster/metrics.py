"""A run's Prometheus metrics, exported by the Ray node that the driver is on.

All events pass through the driver, so it sets all metrics: each has one series per run, which a worker's restart does
not interrupt.
"""

import threading
import time

from ray.util.metrics import Counter, Gauge

from pipeline.train.events import (
    Diagnosed,
    Evaluated,
    Event,
    FirstStep,
    Resumed,
    Saved,
    Step,
    WorkersLost,
    WorkersStarted,
)

_REFRESH_S = 5.0  # Ray drops a gauge that was not set for 20 s

# Names and descriptions. Ray adds the prefix `ray_`, and the suffix `_total` to counters.
GAUGES = {
    "densenet_start_timestamp_seconds": "Unix time at which the driver started training",
    "densenet_last_progress_timestamp_seconds": "Unix time of the last log line, evaluation or checkpoint, or of the "
    "start",
    "densenet_last_checkpoint_timestamp_seconds": "Unix time of the last checkpoint that this driver saw",
    "densenet_target_samples": "training samples of the whole run",
    "densenet_samples_seen": "training samples since the start of the run, over all workers",
    "densenet_epoch": "passes over the training split, with fraction",
    "densenet_eta_seconds": "estimated seconds left in training",
    "densenet_workers": "workers (ranks)",
    "densenet_loss": "mean training loss since the last log line",
    "densenet_learning_rate": "learning rate of the last step",
    "densenet_grad_norm": "L2 norm of the last step's gradient before clipping",
    "densenet_loss_scale": "loss scale of fp16",
    "densenet_images_per_second": "training images per second, over all workers",
    "densenet_step_seconds": "seconds per optimizer step",
    "densenet_data_wait_ratio": "fraction of the time that the slowest worker waited for data, 0 to 1",
    "densenet_mfu_ratio": "model FLOPs utilization of rank 0, 0 to 1",
    "densenet_gpu_memory_peak_bytes": "peak allocated GPU memory of rank 0, bytes",
    "densenet_slow_ranks": "ranks that were slow in the last two intervals",
    "densenet_slowest_rank": "number of the rank with the longest forward passes",
    "densenet_slowest_rank_ratio": "time of the slowest rank's forward passes over the median rank's",
    "densenet_val_top1_ratio": "validation top-1 accuracy of the weights, 0 to 1",
    "densenet_val_ema_top1_ratio": "validation top-1 accuracy of the EMA of the weights, 0 to 1",
    "densenet_val_loss": "validation loss of the weights",
}
COUNTERS = {
    "densenet_restarts": "restarts of the workers, after a failure or for another number of workers",
    "densenet_worker_failures": "failures of one or more workers at once",
    "densenet_non_finite_steps": "steps with a NaN or infinite loss",
    "densenet_skipped_steps": "steps that did not change the weights: non-finite losses, fp16 overflows",
}

_STEP = {
    "samples_seen": "samples_seen",
    "epoch": "epoch",
    "eta_s": "eta_seconds",
    "loss": "loss",
    "lr": "learning_rate",
    "grad_norm": "grad_norm",
    "loss_scale": "loss_scale",
    "img_per_s": "images_per_second",
    "step_s": "step_seconds",
    "data_wait": "data_wait_ratio",
    "mfu": "mfu_ratio",
    "slow_ranks": "slow_ranks",
    "slowest_rank": "slowest_rank",
    "slowest_rank_ratio": "slowest_rank_ratio",
}  # attributes of `Step`, and their gauges
_OF_RUNNING_WORKERS = (
    "workers",
    "eta_seconds",
    "images_per_second",
    "step_seconds",
    "data_wait_ratio",
    "mfu_ratio",
    "slow_ranks",
    "slowest_rank",
    "slowest_rank_ratio",
)
_WEIGHTS = {"raw": "val_top1_ratio", "ema": "val_ema_top1_ratio"}


class RunMetrics:
    """Exports the metrics `ray_densenet_*` of a run from its driver's events.

    Call `start` before the first event and `stop` after the last. Gauges disappear half a minute after the end;
    counters remain in the Ray node until it ends.
    """

    def __init__(self, run_name: str, target_samples: int) -> None:
        tags = {"run": run_name}
        self._gauges = {name: Gauge(name, text, tag_keys=("run",)) for name, text in GAUGES.items()}
        self._counters = {name: _ZeroCounter(name, text, tag_keys=("run",)) for name, text in COUNTERS.items()}
        for metric in [*self._gauges.values(), *self._counters.values()]:
            metric.set_default_tags(tags)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._started = False
        self._values = {"densenet_target_samples": float(target_samples)}

    @property
    def values(self) -> dict[str, float]:
        """The current values of the gauges by name, without those that are not known."""
        with self._lock:
            return dict(self._values)

    def start(self) -> None:
        """Starts the export, with the counters at zero."""
        self._set(start_timestamp_seconds=time.time(), last_progress_timestamp_seconds=time.time())
        for counter in self._counters.values():
            counter.start()
        self._thread = threading.Thread(target=self._refresh, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the export of the gauges."""
        self._ended.set()
        self._thread.join()

    def on_event(self, event: Event) -> None:
        """Sets the metrics of an event; ignores events of other types."""
        match event:
            case WorkersStarted():
                if self._started:
                    self._counters["densenet_restarts"].inc()
                self._started = True
                self._forget_workers()
                self._set(workers=event.workers)
            case WorkersLost():
                self._counters["densenet_worker_failures"].inc()
                self._forget_workers()
            case Resumed():
                self._set(samples_seen=event.samples_seen)
            case FirstStep():
                self._set(samples_seen=event.samples_seen, last_progress_timestamp_seconds=time.time())
            case Step():
                self._on_step(event)
            case Evaluated(result=result):
                self._set(**{_WEIGHTS[event.weights]: result.top1 / 100})
                if event.weights == "raw":
                    self._set(val_loss=result.loss)
                self._set(last_progress_timestamp_seconds=time.time())
            case Saved():
                self._set(last_checkpoint_timestamp_seconds=time.time(), last_progress_timestamp_seconds=time.time())
            case Diagnosed():
                self._counters["densenet_non_finite_steps"].inc()

    def _on_step(self, event: Step) -> None:
        memory = None if event.gpu_memory_gb is None else event.gpu_memory_gb * 1e9
        values = {name: getattr(event, attribute) for attribute, name in _STEP.items()}
        self._set(**values, gpu_memory_peak_bytes=memory, last_progress_timestamp_seconds=time.time())
        if event.skipped_steps:
            self._counters["densenet_skipped_steps"].inc(event.skipped_steps)

    def _forget_workers(self) -> None:
        """Ends the series of what only running workers have: during a restart there is no throughput."""
        self._set(**dict.fromkeys(_OF_RUNNING_WORKERS))

    def _set(self, **values: float | None) -> None:
        """Sets gauges by name without prefix; None ends a series."""
        with self._lock:
            for key, value in values.items():
                name = f"densenet_{key}"
                if value is None:
                    self._values.pop(name, None)
                else:
                    self._values[name] = value
                    self._gauges[name].set(value)

    def _refresh(self) -> None:
        """Sets all gauges again until the end, because Ray exports only values that were set lately."""
        while not self._ended.wait(_REFRESH_S):
            for name, value in self.values.items():
                self._gauges[name].set(value)


class _ZeroCounter(Counter):
    """A counter that can start at zero, without which Prometheus' `increase` misses the first event."""

    def start(self) -> None:
        """Exports the value zero."""
        self._record(0)
