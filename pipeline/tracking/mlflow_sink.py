"""MLflow as the sink of a run's records: one MLflow run, created at once or when its store becomes reachable."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.tracking.client import connect, experiment_id, first_line
from pipeline.tracking.stores import redacted, stores_from_config

STATE = "mlflow_run.json"


class MlflowSink:
    """The MLflow run of a run folder; `mlflow_run.json` stores its id and the journal offset `sent`.

    `parent` is the id of the parent run; `warn` receives messages about records that are not stored.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, name: str, parent: str | None, warn: Callable[[str], None]
    ) -> None:
        self.stores = stores_from_config(config)
        self.uri = self.stores.tracking
        self._config, self._name, self._parent, self._warn = config, name, parent, warn
        self._state_file = run_dir / STATE
        state = json.loads(self._state_file.read_text(encoding="utf-8")) if self._state_file.is_file() else {}
        self.run_id: str | None = state.get("run_id")
        self.sent: int = state.get("sent", 0)
        self._client: MlflowClient | None = None

    def open(self) -> MlflowClient:
        """Connects, and creates the MLflow run or checks the existing one.

        Raises:
            UserError: The store is unreachable, unusable, rejects the experiment, or no longer has the run.
        """
        client = connect(self.uri)
        self._client = client
        try:
            if self.run_id is None:
                experiment = experiment_id(client, self._config, self.uri)
                tags = {} if self._parent is None else {"mlflow.parentRunId": self._parent}
                self.run_id = client.create_run(experiment, run_name=self._name, tags=tags).info.run_id
                self.save(self.sent)
            else:
                self._check_existing_run(client)
        except (MlflowException, OSError) as error:
            raise UserError(
                f"MLflow at {redacted(self.uri)} rejected the run: {first_line(error, self.uri)}"
            ) from error
        return client

    def _check_existing_run(self, client: MlflowClient) -> None:
        new_run = f"or remove {self._state_file} to send all records to a new MLflow run"
        try:
            run = client.get_run(str(self.run_id))
        except MlflowException as error:
            raise UserError(
                f"MLflow at {redacted(self.uri)} has no run {self.run_id}, which this run folder belongs to: set "
                f"tracking.uri to the store that has it, {new_run}."
            ) from error
        if run.info.lifecycle_stage != "active":
            raise UserError(
                f"the run {self.run_id} is deleted in {redacted(self.uri)}: restore it with `mlflow runs restore "
                f"--run-id {self.run_id}`, {new_run}."
            )

    def save(self, sent: int) -> None:
        """Saves the journal offset up to which all records were sent."""
        self.sent = sent
        state = {
            "run_id": self.run_id,
            "uri": redacted(self.uri),
            "registry": redacted(self.stores.registry),
            "sent": sent,
        }
        try:
            write_text(self._state_file, json.dumps(state) + "\n")
        except OSError as error:  # records may be sent twice; MLflow stores duplicates once
            self._warn(f"{self._state_file} cannot be written: {error.strerror}")

    def describe_error(self, error: Exception) -> str:
        """Describes an error of `deliver` for a warning."""
        return f"MLflow at {redacted(self.uri)} does not accept records ({first_line(error, self.uri)})"

    def check_store(self, file: Path) -> None:
        """Tries at the start what the end of a run needs: stores `file` as an artifact and lists logged models.

        Does nothing while the tracking store is unreachable.

        Raises:
            UserError: The artifact store rejects the file, or the server is too old for logged models.
        """
        client = self._client
        if client is None or self.run_id is None:
            return
        try:
            client.search_logged_models([client.get_run(self.run_id).info.experiment_id], max_results=1)
        except MlflowException as error:
            raise UserError(
                f"MLflow at {redacted(self.uri)} does not support logged models, which storing the model at the end of "
                f"the run needs: {first_line(error, self.uri)} Upgrade the server to MLflow 3, or set tracking.uri to "
                f"another one."
            ) from error
        try:
            client.log_artifact(self.run_id, str(file))
        except Exception as error:  # artifact stores raise errors of many kinds
            try:
                artifact_uri = client.get_run(self.run_id).info.artifact_uri
            except MlflowException:
                return
            raise UserError(
                f"the artifact store of {redacted(self.uri)}, {redacted(artifact_uri)}, rejects files: "
                f"{first_line(error, self.uri)} The run stores its checkpoint list and its model there: grant this "
                f"user write permission, or set tracking.experiment to one with another artifact location."
            ) from error

    def deliver(self, records: list[dict[str, Any]]) -> None:
        """Stores records of one kind; creates the MLflow run first if that failed before."""
        client = self._client if self._client is not None and self.run_id is not None else self.open()
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
        """Stores an artifact; skips it with a warning if the artifact store rejects it and the server is reachable."""
        try:
            client.log_artifact(run_id, file, folder)
        except Exception as error:  # artifact stores raise errors of many kinds
            client.get_run(run_id)  # raises if the server is unreachable: the record is sent again later
            self._warn(f"{file} was not stored with the run in MLflow: {first_line(error, self.uri)}")


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
