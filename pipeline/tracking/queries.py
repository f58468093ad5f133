"""What the tracking store knows of past runs."""

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

_MOST = 1000


@dataclass(frozen=True)
class TrackedRunInfo:
    """One run; `started` is a Unix time, seconds, `minutes` None where it has not ended, `metrics` the last ones."""

    id: str
    name: str
    status: str
    started: float
    minutes: float | None
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def list_runs(uri: str, experiment: str) -> list[TrackedRunInfo]:
    """The runs of an experiment, newest first.

    Raises:
        UserError: there is no such experiment; the message lists those there are.
    """
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in client.search_experiments()) or "none"
        raise UserError(f"there is no experiment '{experiment}' in {redacted(uri)}; there are: {names}.")
    return [_past(run) for run in client.search_runs([found.experiment_id], max_results=_MOST)]


def find_run(uri: str, experiment: str, name_or_id: str) -> TrackedRunInfo:
    """A run by its id, or the newest one of a name.

    Raises:
        UserError: there is none; the message lists the newest ones.
    """
    try:
        return _past(connect(uri).get_run(name_or_id))
    except MlflowException:
        runs = list_runs(uri, experiment)
    for run in runs:
        if run.name == name_or_id:
            return run
    newest = ", ".join(run.name for run in runs[:5]) or "none"
    raise UserError(f"there is no run '{name_or_id}' in {redacted(uri)}; the newest: {newest}.")


def get_run(uri: str, run_id: str) -> TrackedRunInfo | None:
    """A run by its id; None where the store does not have it."""
    client = connect(uri)
    try:
        return _past(client.get_run(run_id))
    except MlflowException:
        return None


def differences(runs: list[TrackedRunInfo]) -> list[tuple[str, list[str]]]:
    """Parameters whose values are not the same in all runs, but for where these write."""
    found = []
    for key in sorted({key for run in runs for key in run.params}):
        values = [run.params.get(key, "") for run in runs]
        if len(set(values)) > 1 and not key.startswith("run."):
            found.append((key, values))
    return found


def metric_history(uri: str, run_id: str, keys: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """All values of some metrics of a run by samples seen, in that order; those it does not have are left out."""
    client = connect(uri)
    found = {key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys}
    return {key: points for key, points in found.items() if points}


def read_artifact(uri: str, run_id: str, name: str) -> str | None:
    """The text of a run's artifact; None where it has none of this name.

    Raises:
        UserError: the artifact store does not answer.
    """
    client = connect(uri)
    try:
        if name not in [file.path for file in client.list_artifacts(run_id)]:
            return None
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):  # its progress bar
            return Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
    except Exception as error:  # each kind of artifact store has errors of its own
        raise UserError(
            f"{name} of the run {run_id} cannot be read from {redacted(uri)}: {first_line(error, uri)}"
        ) from error


def end_child_runs(uri: str, parent: str) -> None:
    """Ends the runs that are part of `parent` and still running, as killed: their processes are gone."""
    client = connect(uri)
    experiment = client.get_run(parent).info.experiment_id
    for run in client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=_MOST):
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")


def run_folder(run_id: str, uri: str) -> Path:
    """The folder of the training run with this id, as it was recorded.

    Raises:
        UserError: the store has no such run.
    """
    try:
        params = connect(uri).get_run(run_id).data.params
        return Path(params["run.output"]) / params["run.name"]
    except (MlflowException, KeyError) as error:
        raise UserError(f"{redacted(uri)} has no training run with the id {run_id}.") from error


def _past(run: Run) -> TrackedRunInfo:
    started, ended = run.info.start_time / 1000, run.info.end_time
    minutes = None if ended is None else (ended / 1000 - started) / 60
    data = run.data
    return TrackedRunInfo(
        run.info.run_id, run.info.run_name, run.info.status, started, minutes, data.params, data.metrics, data.tags
    )
