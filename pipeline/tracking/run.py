"""One MLflow run per training, written by the driver alone; a server that is away never holds up a run."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking.database import Unreachable
from pipeline.tracking.journal import Journal
from pipeline.tracking.store import connect, experiment_id, first_line
from pipeline.tracking.stores import shown, stores_of

JOURNAL, STATE = "tracking.jsonl", "mlflow_run.json"
_RETRY_S = (0.5, 1, 2, 5, 10)
_TOLD_AFTER = 3  # failures in a row
_END_S = 30.0  # for a run that has failed or was stopped

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """Writes one run: its methods return at once, a thread sends what they record, in order, until it is stored.

    Records go to `tracking.jsonl` in the run's folder first. `mlflow_run.json` holds the run's id and how much of the
    records was sent; a restart continues there, and MLflow itself keeps a metric that is sent twice once. Steps that
    are trained again after a restart leave the values that they had: a metric has one value at each step.

    Use it as a context manager: the run ends as FINISHED, as KILLED after Ctrl-C or an exit, as FAILED after any other
    error. `unsent` is then how many records the store did not take in time.
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
        self.stores, self.unsent = stores_of(config), 0
        self.uri = self.stores.tracking
        self._config, self._name, self._told, self._parent = config, name, told, parent
        run_dir.mkdir(parents=True, exist_ok=True)
        self._state_file = run_dir / STATE
        state = json.loads(self._state_file.read_text(encoding="utf-8")) if self._state_file.is_file() else {}
        self.run_id: str | None = state.get("run_id")
        self.journal = Journal(run_dir / JOURNAL, told)
        self._farthest: dict[str, int] = {}  # by metric, samples
        for record in self.journal.records():
            if record["kind"] == "metrics":
                self._new(record["values"], record["samples_seen"])
        self._sent = min(state.get("sent", 0), self.journal.size)
        self._client: MlflowClient | None = None
        self._told_reasons: set[str] = set()
        self._change = threading.Condition()
        self._closing, self._give_up = False, threading.Event()
        try:
            self._open()
        except Unreachable as error:
            if config.tracking.on_unreachable == "fail":
                raise
            told(f"{error} Records are kept in {self.journal.file} and sent when it answers.")
        if running:
            self._append("status", status="RUNNING")
        self._thread = threading.Thread(target=self._send, name="tracker", daemon=True)
        self._thread.start()

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
        """Stores a file as an artifact and asks for models, as the end of a run does: so a refusal comes at the start.

        A tracking store that is away is let be.

        Raises:
            UserError: the artifact store does not take it, or the server is too old for models.
        """
        client = self._client
        if client is None or self.run_id is None:
            return
        try:
            client.search_logged_models([client.get_run(self.run_id).info.experiment_id], max_results=1)
        except MlflowException as error:
            raise UserError(
                f"MLflow at {shown(self.uri)} does not list models, which the end of a run stores one of: "
                f"{first_line(error, self.uri)} A server of MLflow 3 does: upgrade it, or set tracking.uri to another."
            ) from error
        try:
            client.log_artifact(self.run_id, str(file))
        except Exception as error:  # each kind of artifact store has errors of its own
            try:
                where = client.get_run(self.run_id).info.artifact_uri
            except MlflowException:
                return
            raise UserError(
                f"the artifact store of {shown(self.uri)}, {shown(where)}, takes no files: "
                f"{first_line(error, self.uri)} Checkpoints' records and the model go there: let this user write, "
                f"or set tracking.experiment to one whose artifacts are elsewhere."
            ) from error

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was recorded is stored, and says whether it is."""
        with self._change:
            return self._change.wait_for(lambda: self._sent >= self.journal.size, timeout_s)

    def finish(self, status: Status, timeout_s: float | None = None) -> None:
        """Sends what is left and ends the run; waits for a store that is away, `tracking.patience_s` by default."""
        self._append("status", status=status, time_ms=time.time_ns() // 1_000_000)
        self.close(self._config.tracking.patience_s if timeout_s is None else timeout_s)

    def close(self, timeout_s: float) -> None:
        """Sends what is left, and leaves the run as it is."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join(timeout_s)
        self._give_up.set()
        self.unsent = sum(1 for _ in self.journal.records(self._sent))

    def _append(self, kind: str, **content: Any) -> None:
        with self._change:
            self.journal.append(kind, **content)
            self._change.notify_all()

    def _open(self) -> MlflowClient:
        """Connects, and creates the run or finds it."""
        client = connect(self.uri)
        self._client = client
        try:
            if self.run_id is None:
                experiment = experiment_id(client, self._config, self.uri)
                tags = {} if self._parent is None else {"mlflow.parentRunId": self._parent}
                self.run_id = client.create_run(experiment, run_name=self._name, tags=tags).info.run_id
                self._save()
            else:
                self._check_there(client)
        except (MlflowException, OSError) as error:
            raise UserError(f"MLflow at {shown(self.uri)} refused the run: {first_line(error, self.uri)}") from error
        return client

    def _check_there(self, client: MlflowClient) -> None:
        again = f"or remove {self._state_file}, and all records go to a new run there"
        try:
            found = client.get_run(str(self.run_id))
        except MlflowException as error:
            raise UserError(
                f"MLflow at {shown(self.uri)} has no run {self.run_id}, which this run's folder continues: set "
                f"tracking.uri to where it is, {again}."
            ) from error
        if found.info.lifecycle_stage != "active":
            raise UserError(
                f"the run {self.run_id} is deleted in {shown(self.uri)}: `mlflow runs restore --run-id {self.run_id}` "
                f"brings it back, {again}."
            )

    def _save(self) -> None:
        temporary = self._state_file.with_name(f"{STATE}.tmp")
        state = {"run_id": self.run_id, "uri": shown(self.uri), "registry": shown(self.stores.registry)}
        state["sent"] = self._sent
        try:
            temporary.write_text(json.dumps(state) + "\n", encoding="utf-8")
            temporary.replace(self._state_file)
        except OSError as error:  # the same records may be sent again, which MLflow keeps once
            self._tell(f"{self._state_file} cannot be written: {error.strerror}")

    def _tell(self, reason: str) -> None:
        if reason not in self._told_reasons:
            self._told_reasons.add(reason)
            self._told(reason)

    def _send(self) -> None:
        failures = 0
        while True:
            with self._change:
                self._change.wait_for(lambda: self._sent < self.journal.size or self._closing)
                if self._sent >= self.journal.size:
                    return
                records, end = self.journal.read(self._sent)
            try:
                self._deliver(records)
            except Exception as error:  # each kind of store has errors of its own, and the next try may succeed
                failures += 1
                if failures == _TOLD_AFTER:
                    self._tell(
                        f"MLflow at {shown(self.uri)} takes no records ({first_line(error, self.uri)}); they are kept "
                        f"in {self.journal.file}, and it is tried again"
                    )
                if self._give_up.wait(_RETRY_S[min(failures, len(_RETRY_S)) - 1]):
                    return
                continue
            failures = 0
            with self._change:
                self._sent = end
                self._save()
                self._change.notify_all()

    def _deliver(self, records: list[dict[str, Any]]) -> None:
        """Sends records of one kind."""
        client = self._client if self._client is not None and self.run_id is not None else self._open()
        run_id, first = str(self.run_id), records[0]
        match first["kind"]:
            case "metrics":
                metrics = (
                    Metric(key, value, record["time_ms"], record["samples_seen"])
                    for record in records
                    for key, value in record["values"].items()
                )
                while part := list(islice(metrics, MAX_METRICS_PER_BATCH)):
                    client.log_batch(run_id, metrics=part, synchronous=True)
            case "tags":
                _log_tags(client, run_id, {key: text for record in records for key, text in record["values"].items()})
            case "params":
                _log_params(client, run_id, first["values"])
            case "artifact":
                self._log_artifact(client, run_id, first["file"], first["folder"])
            case "dataset":
                dataset = Dataset(
                    first["name"],
                    first["digest"][:36],
                    source_type="local",
                    source=json.dumps({"uri": first["source"]}),
                    profile=first["profile"],
                )
                tag = InputTag("mlflow.data.context", first["context"])
                client.log_inputs(run_id, [DatasetInput(dataset, [tag])])
            case "status" if first["status"] == "RUNNING":
                client.update_run(run_id, status="RUNNING")
            case "status":
                client.set_terminated(run_id, first["status"], end_time=first["time_ms"])

    def _log_artifact(self, client: MlflowClient, run_id: str, file: str, folder: str | None) -> None:
        """Stores a file; one that the artifact store does not take is left where it is, while the server answers."""
        try:
            client.log_artifact(run_id, file, folder)
        except Exception as error:  # each kind of artifact store has errors of its own
            client.get_run(run_id)
            self._tell(f"{file} was not stored with the run in MLflow: {first_line(error, self.uri)}")


def _log_params(client: MlflowClient, run_id: str, values: dict[str, str]) -> None:
    logged = client.get_run(run_id).data.params
    new = (Param(key, text) for key, text in values.items() if key not in logged)
    while part := list(islice(new, MAX_PARAMS_TAGS_PER_BATCH)):
        client.log_batch(run_id, params=part, synchronous=True)
    _log_tags(
        client,
        run_id,
        {f"changed.{key}": text for key, text in values.items() if key in logged and logged[key] != text},
    )


def _log_tags(client: MlflowClient, run_id: str, values: dict[str, str]) -> None:
    tags: Iterator[RunTag] = (RunTag(key, text) for key, text in values.items())
    while part := list(islice(tags, MAX_PARAMS_TAGS_PER_BATCH)):
        client.log_batch(run_id, tags=part, synchronous=True)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
