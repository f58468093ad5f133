"""Logs one run to MLflow and to custom trackers, through a journal on the driver's disk; never blocks training."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.extension_points import TRACKERS, Sink
from pipeline.files import write_text
from pipeline.tracking.database import Unreachable
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow_sink import MlflowSink
from pipeline.tracking.sender import Sender

JOURNAL = "tracking.jsonl"
_ABORT_TIMEOUT_S = 30.0  # for a run that failed or was stopped

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """Logs one run. Methods return at once; one thread per sink sends the records in order.

    Records go to `tracking.jsonl` in the run folder first, then to MLflow and to the trackers of `tracking.custom`. The
    offset sent to each sink is stored next to it, and a restart continues there; MLflow stores duplicate metrics once.
    Steps that are trained again after a restart keep their first values: a metric has one value per step.

    Use it as a context manager: the run ends as FINISHED, as KILLED after Ctrl-C or an exit, as FAILED after any other
    error. `unsent` then counts the records that MLflow did not accept in time.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        name: str,
        warn: Callable[[str], None],
        parent: str | None = None,
        running: bool = True,
    ) -> None:
        """Creates the MLflow run, or continues the existing one of this folder.

        Args:
            config: The run's config.
            run_dir: The run folder.
            name: Name of the MLflow run.
            warn: Receives warnings, each once.
            parent: Id of the parent run.
            running: Sets the status RUNNING; False only sends the records that the journal has.

        Raises:
            UserError: The store is unreachable (unless `tracking.on_unreachable` is `spool`), unusable, rejects the
                experiment, or no longer has the run.
        """
        self.unsent = 0
        self._config, self._warn = config, warn
        self._warnings: set[str] = set()
        run_dir.mkdir(parents=True, exist_ok=True)
        self._mlflow = MlflowSink(config, run_dir, name, parent, self._warn_once)
        self.stores, self.uri = self._mlflow.stores, self._mlflow.uri
        self.journal = Journal(run_dir / JOURNAL, warn)
        self._last_step: dict[str, int] = {}  # by metric, in samples seen
        for record in self.journal.records():
            if record["kind"] == "metrics":
                self._new_values(record["values"], record["samples_seen"])
        self._condition = threading.Condition()
        try:
            self._mlflow.open()
        except Unreachable as error:
            if config.tracking.on_unreachable == "fail":
                raise
            warn(f"{error} Records stay in {self.journal.file} and are sent when it is reachable.")
        custom = {name: self._open_custom(name, run_dir) for name in config.tracking.custom}
        if running:
            self._append("status", status="RUNNING")
        sink = self._mlflow
        self._mlflow_sender = Sender(
            self.journal, self._condition, sink, sink.sent, sink.save, sink.describe_error, self._warn_once
        )
        self._custom_senders = {name: self._start_sender(name, sink, run_dir) for name, sink in custom.items()}

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None if the store was unreachable so far."""
        return self._mlflow.run_id

    def _open_custom(self, name: str, run_dir: Path) -> Sink:
        try:
            return TRACKERS[name](self._config, run_dir)
        except Exception as error:  # plugins raise errors of any kind
            raise UserError(f"tracking.custom: the tracker {name} cannot be opened: {_describe(error)}.") from error

    def _start_sender(self, name: str, sink: Sink, run_dir: Path) -> Sender:
        """Starts the thread of a plugin's tracker; `tracker-NAME.json` stores its journal offset."""
        file = run_dir / f"tracker-{name}.json"
        sent = json.loads(file.read_text(encoding="utf-8"))["sent"] if file.is_file() else 0

        def save(sent: int) -> None:
            try:
                write_text(file, json.dumps({"sent": sent}) + "\n")
            except OSError as error:
                self._warn_once(f"{file} cannot be written: {error.strerror}")

        def describe_error(error: Exception) -> str:
            return f"the tracker {name} does not accept records ({_describe(error)})"

        return Sender(self.journal, self._condition, sink, sent, save, describe_error, self._warn_once)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED", _ABORT_TIMEOUT_S)

    def log_metrics(self, metrics: Mapping[str, float], samples_seen: int) -> None:
        """Logs metrics with the current time at the step `samples_seen`.

        A metric that already has a value at this or a later step keeps it: the step was trained again after a restart.
        The journal records the step in any case.
        """
        values = {key: float(value) for key, value in self._new_values(metrics, samples_seen).items()}
        self._append("metrics", time_ms=time.time_ns() // 1_000_000, samples_seen=samples_seen, values=values)

    def last_step(self, key: str) -> int:
        """Returns the last step of a metric, in samples seen; -1 if it has no value."""
        return self._last_step.get(key, -1)

    def _new_values(self, metrics: Mapping[str, float], samples_seen: int) -> dict[str, float]:
        """Selects the metrics without a value at this or a later step, and updates their last step."""
        new = {key: value for key, value in metrics.items() if samples_seen > self._last_step.get(key, -1)}
        self._last_step |= dict.fromkeys(new, samples_seen)
        return new

    def log_params(self, values: Mapping[str, object]) -> None:
        """Logs parameters, flattened. MLflow's are immutable, so a changed value becomes the tag `changed.KEY`."""
        flat = {key: str(value)[:MAX_PARAM_VAL_LENGTH] for key, value in _flatten(values).items()}
        self._append("params", values=flat)

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Sets tags."""
        self._append("tags", values=dict(values))

    def log_artifact(self, file: Path, folder: str | None = None) -> None:
        """Logs a file as an artifact, with its content at the time of sending."""
        self._append("artifact", file=str(file), folder=folder)

    def log_dataset(self, context: str, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None:
        """Logs a data set as `mlflow.log_input` does; `context` is `training` or `validation`."""
        self._append(
            "dataset", context=context, name=name, digest=digest, source=source, profile=json.dumps(dict(profile))
        )

    def check_store(self, file: Path) -> None:
        """Checks at the start what the end of the run needs, see `MlflowSink.check_store`."""
        self._mlflow.check_store(file)

    def flush(self, timeout_s: float) -> bool:
        """Waits until MLflow has all records; returns False on timeout."""
        return self._mlflow_sender.flush(timeout_s)

    def finish(self, status: Status, timeout_s: float | None = None) -> None:
        """Sends the remaining records and sets the final status; waits `tracking.wait_timeout_s` by default."""
        self._append("status", status=status, time_ms=time.time_ns() // 1_000_000)
        self.close(self._config.tracking.wait_timeout_s if timeout_s is None else timeout_s)

    def close(self, timeout_s: float) -> None:
        """Sends the remaining records; does not change the run's status."""
        deadline = time.monotonic() + timeout_s
        self.unsent = self._mlflow_sender.close(timeout_s)
        for name, sender in self._custom_senders.items():
            unsent = sender.close(max(0.0, deadline - time.monotonic()))
            if unsent:
                self._warn(f"the tracker {name} did not accept {unsent} records; it gets them when the run is resumed")

    def _append(self, kind: str, **content: Any) -> None:
        with self._condition:
            self.journal.append(kind, **content)
            self._condition.notify_all()

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.add(message)
            self._warn(message)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(".: ")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
