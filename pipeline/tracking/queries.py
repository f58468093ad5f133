"""Queries of past runs in the tracking store."""

import io
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipeline.errors import UserError
from pipeline.tracking.client import connect, first_line
from pipeline.tracking.stores import redacted

_MAX_RUNS = 1000


@dataclass(frozen=True)
class TrackedRunInfo:
    """One run.

    `started` is a Unix time in seconds, `minutes` the duration (None while the run is active), `metrics` the last
    values.
    """

    id: str
    name: str
    status: str
    started: float
    minutes: float | None
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def list_runs(uri: str, experiment: str) -> list[TrackedRunInfo]:
    """Returns the runs of an experiment, newest first.

    Raises:
        UserError: There is no such experiment; the message lists the existing ones.
    """
    client = connect(uri)
    existing = client.get_experiment_by_name(experiment)
    if existing is None:
        names = ", ".join(e.name for e in client.search_experiments()) or "none"
        raise UserError(f"there is no experiment '{experiment}' in {redacted(uri)}; existing experiments: {names}.")
    return [_run_info(run) for run in client.search_runs([existing.experiment_id], max_results=_MAX_RUNS)]


def find_run(uri: str, experiment: str, name_or_id: str) -> TrackedRunInfo:
    """Returns a run by id, or the newest run of a name.

    Raises:
        UserError: There is no such run; the message lists the newest runs.
    """
    try:
        return _run_info(connect(uri).get_run(name_or_id))
    except MlflowException:
        runs = list_runs(uri, experiment)
    for run in runs:
        if run.name == name_or_id:
            return run
    newest = ", ".join(run.name for run in runs[:5]) or "none"
    raise UserError(f"there is no run '{name_or_id}' in {redacted(uri)}; newest runs: {newest}.")


def get_run(uri: str, run_id: str) -> TrackedRunInfo | None:
    """Returns a run by id; None if the store does not have it."""
    client = connect(uri)
    try:
        return _run_info(client.get_run(run_id))
    except MlflowException:
        return None


def differences(runs: list[TrackedRunInfo]) -> list[tuple[str, list[str]]]:
    """Returns the parameters that differ between runs, with the values in all runs; excludes `run.*` (output paths)."""
    different = []
    for key in sorted({key for run in runs for key in run.params}):
        values = [run.params.get(key, "") for run in runs]
        if len(set(values)) > 1 and not key.startswith("run."):
            different.append((key, values))
    return different


def metric_history(uri: str, run_id: str, keys: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """Returns the history of metrics as (samples seen, value), sorted; omits metrics that the run does not have."""
    client = connect(uri)
    history = {key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys}
    return {key: points for key, points in history.items() if points}


def read_artifact(uri: str, run_id: str, name: str) -> str | None:
    """Returns the text of a run's artifact; None if there is no artifact of this name.

    Raises:
        UserError: The artifact store is unreachable.
    """
    client = connect(uri)
    try:
        if name not in [file.path for file in client.list_artifacts(run_id)]:
            return None
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):  # MLflow's progress bar
            return Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
    except Exception as error:  # artifact stores raise errors of many kinds
        raise UserError(
            f"{name} of the run {run_id} cannot be read from {redacted(uri)}: {first_line(error, uri)}"
        ) from error


def end_child_runs(uri: str, parent: str) -> None:
    """Ends the child runs of `parent` that still have status RUNNING as KILLED: their processes have ended."""
    client = connect(uri)
    experiment = client.get_run(parent).info.experiment_id
    for run in client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=_MAX_RUNS):
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")


def run_folder(run_id: str, uri: str) -> Path:
    """Returns the run folder of the training run with this id, from its parameters.

    Raises:
        UserError: The store has no such run.
    """
    try:
        params = connect(uri).get_run(run_id).data.params
        return Path(params["run.output"]) / params["run.name"]
    except (MlflowException, KeyError) as error:
        raise UserError(f"{redacted(uri)} has no training run with the id {run_id}.") from error


def _run_info(run: Run) -> TrackedRunInfo:
    started, ended = run.info.start_time / 1000, run.info.end_time
    minutes = None if ended is None else (ended / 1000 - started) / 60
    data = run.data
    return TrackedRunInfo(
        run.info.run_id, run.info.run_name, run.info.status, started, minutes, data.params, data.metrics, data.tags
    )
