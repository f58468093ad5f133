"""One run's records: a journal on the driver's disk, and the sinks that they are sent to; none holds up a run."""

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
_END_S = 30.0  # for a run that has failed or was stopped

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """Writes one run: its methods return at once, a thread for each sink sends what they record, in order.

    Records go to `tracking.jsonl` in the run's folder first, then to MLflow and to the trackers of `tracking.custom`. How
    much each was sent is kept beside it, and a restart continues there; MLflow keeps a metric that is sent twice once.
    Steps that are trained again after a restart leave the values that they had: a metric has one value at each step.

    Use it as a context manager: the run ends as FINISHED, as KILLED after Ctrl-C or an exit, as FAILED after any other
    error. `unsent` is then how many records MLflow did not take in time.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        name: str,
        told: Callable[[str], None],
        parent: str | None = None,
        running: bool = True,
    ) -> None:
        """Creates the run, or continues the one of this folder; `parent` is the id of the run that it is part of.

        Without `running` nothing is added to what is there to be sent.

        Raises:
            UserError: the store does not answer (unless `tracking.on_unreachable` is `spool`), cannot be used, refuses
                the experiment, or has no such run any more.
        """
        self.unsent = 0
        self._config, self._told = config, told
        self._told_reasons: set[str] = set()
        run_dir.mkdir(parents=True, exist_ok=True)
        self._mlflow = MlflowSink(config, run_dir, name, parent, self._tell)
        self.stores, self.uri = self._mlflow.stores, self._mlflow.uri
        self.journal = Journal(run_dir / JOURNAL, told)
        self._farthest: dict[str, int] = {}  # by metric, samples
        for record in self.journal.records():
            if record["kind"] == "metrics":
                self._new(record["values"], record["samples_seen"])
        self._change = threading.Condition()
        try:
            self._mlflow.open()
        except Unreachable as error:
            if config.tracking.on_unreachable == "fail":
                raise
            told(f"{error} Records are kept in {self.journal.file} and sent when it answers.")
        also = {name: self._opened(name, run_dir) for name in config.tracking.custom}
        if running:
            self._append("status", status="RUNNING")
        sink = self._mlflow
        self._to_mlflow = Sender(self.journal, self._change, sink, sink.sent, sink.save, sink.failure, self._tell)
        self._to_others = {name: self._sender(name, sink, run_dir) for name, sink in also.items()}

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None where its store was not there so far."""
        return self._mlflow.run_id

    def _opened(self, name: str, run_dir: Path) -> Sink:
        try:
            return TRACKERS[name](self._config, run_dir)
        except Exception as error:  # what a plugin raises is its own
            raise UserError(f"tracking.custom: the tracker {name} cannot be opened: {_words(error)}.") from error

    def _sender(self, name: str, sink: Sink, run_dir: Path) -> Sender:
        """The thread of a plugin's tracker, with its place in the journal in `tracker-NAME.json`."""
        file = run_dir / f"tracker-{name}.json"
        sent = json.loads(file.read_text(encoding="utf-8"))["sent"] if file.is_file() else 0

        def save(sent: int) -> None:
            try:
                write_text(file, json.dumps({"sent": sent}) + "\n")
            except OSError as error:
                self._tell(f"{file} cannot be written: {error.strerror}")

        def failure(error: Exception) -> str:
            return f"the tracker {name} takes no records ({_words(error)})"

        return Sender(self.journal, self._change, sink, sent, save, failure, self._tell)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED", _END_S)

    def log(self, metrics: Mapping[str, float], samples_seen: int) -> None:
        """Records numbers, taken now at `samples_seen` samples, which is MLflow's step.

        A metric that has a value there, or further on, keeps it: the steps are trained again after a restart. That this
        was reached is in the journal in any case.
        """
        values = {key: float(value) for key, value in self._new(metrics, samples_seen).items()}
        self._append("metrics", time_ms=time.time_ns() // 1_000_000, samples_seen=samples_seen, values=values)

    def farthest(self, key: str) -> int:
        """The last step that a metric has a value at, samples; -1 where it has none."""
        return self._farthest.get(key, -1)

    def _new(self, metrics: Mapping[str, float], samples_seen: int) -> dict[str, float]:
        """Those metrics that have no value at this step or after it; they have one from now on."""
        new = {key: value for key, value in metrics.items() if samples_seen > self._farthest.get(key, -1)}
        self._farthest |= dict.fromkeys(new, samples_seen)
        return new

    def params(self, values: Mapping[str, object]) -> None:
        """Records parameters, flattened; MLflow lets none change, so a changed one is a tag `changed.KEY`."""
        flat = {key: str(value)[:MAX_PARAM_VAL_LENGTH] for key, value in _flat(values).items()}
        self._append("params", values=flat)

    def tags(self, values: Mapping[str, str]) -> None:
        """Records tags."""
        self._append("tags", values=dict(values))

    def attach(self, file: Path, folder: str | None = None) -> None:
        """Records a file as an artifact, as it is when it is sent."""
        self._append("artifact", file=str(file), folder=folder)

    def dataset(self, context: str, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None:
        """Records what the run reads, as `mlflow.log_input` does; `context` is `training` or `validation`."""
        self._append(
            "dataset", context=context, name=name, digest=digest, source=source, profile=json.dumps(dict(profile))
        )

    def check_store(self, file: Path) -> None:
        """As `MlflowSink.check_store`: a store that would refuse the end of the run is told of at its start."""
        self._mlflow.check_store(file)

    def flush(self, timeout_s: float) -> bool:
        """Waits until MLflow has all that was recorded, and says whether it has."""
        return self._to_mlflow.flush(timeout_s)

    def finish(self, status: Status, timeout_s: float | None = None) -> None:
        """Sends what is left and ends the run; waits for a store that is away, `tracking.wait_timeout_s` by default."""
        self._append("status", status=status, time_ms=time.time_ns() // 1_000_000)
        self.close(self._config.tracking.wait_timeout_s if timeout_s is None else timeout_s)

    def close(self, timeout_s: float) -> None:
        """Sends what is left, and leaves the run as it is."""
        until = time.monotonic() + timeout_s
        self.unsent = self._to_mlflow.close(timeout_s)
        for name, sender in self._to_others.items():
            unsent = sender.close(max(0.0, until - time.monotonic()))
            if unsent:
                self._told(f"the tracker {name} did not take {unsent} records; it gets them when the run goes on")

    def _append(self, kind: str, **content: Any) -> None:
        with self._change:
            self.journal.append(kind, **content)
            self._change.notify_all()

    def _tell(self, reason: str) -> None:
        if reason not in self._told_reasons:
            self._told_reasons.add(reason)
            self._told(reason)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(".: ")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
