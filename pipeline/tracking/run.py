"""One MLflow run per training, written by the driver alone; a server that is away never holds up a run."""

import importlib.metadata
import json
import logging
import os
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from filelock import FileLock
from matplotlib.figure import Figure
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

from pipeline.config import Run, RunConfig
from pipeline.errors import UserError

_PACKAGES = ("torch", "timm", "deepspeed", "ray", "mlflow", "nvidia-dali-cuda130")
_RETRY_S = (0.5, 1, 2, 5, 10)
_T = TypeVar("_T")


def tracking_uri(config: RunConfig) -> str:
    """The config's tracking URI, else MLFLOW_TRACKING_URI, else a SQLite file in `run.output`; paths are absolute."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{config.run.output}/mlflow.db"
    path = uri.removeprefix("sqlite:///")
    return f"sqlite:///{Path(path).absolute()}" if path != uri else uri


def default_tracking_uri() -> str:
    """Where a run with an untouched `tracking` section and `run.output` writes, seen from this folder."""
    return tracking_uri(RunConfig(run=Run(output=str(Path("outputs").absolute()))))


def shown(uri: str) -> str:
    """The URI without its password, for messages."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def connect(uri: str) -> MlflowClient:
    """A client for tracking and registry at `uri`, which fails in seconds and keeps quiet on the terminal."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _one_at_a_time(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"no MLflow tracking store answers at {shown(uri)}: {_first_line(error, uri)} Start the server, or "
            f"set tracking.uri, --uri or MLFLOW_TRACKING_URI to another; unset, a SQLite file is used."
        ) from error
    return client


def wait_for(uri: str, patience_s: float, told: Callable[[str], None]) -> None:
    """Waits until the store at `uri` answers; `told` gets one message where it does not at once.

    Raises:
        UserError: it has not answered for so long.
    """
    deadline, waits = time.monotonic() + patience_s, False
    while True:
        try:
            connect(uri)
            return
        except UserError:
            if time.monotonic() >= deadline:
                raise
        if not waits:
            told(f"MLflow at {shown(uri)} does not answer; waiting up to {patience_s:g} s for it (tracking.patience_s)")
            waits = True
        time.sleep(_RETRY_S[0])


def run_folder(run_id: str, uri: str) -> Path:
    """The folder of the training run with this id, as it was recorded.

    Raises:
        UserError: the store has no such run.
    """
    try:
        params = connect(uri).get_run(run_id).data.params
        return Path(params["run.output"]) / params["run.name"]
    except (MlflowException, KeyError) as error:
        raise UserError(f"{shown(uri)} has no training run with the id {run_id}.") from error


def _one_at_a_time(uri: str) -> AbstractContextManager[object]:
    """Keeps processes from making the tables of the same new SQLite file at the same time, which MLflow fails at."""
    if not uri.startswith("sqlite:///"):
        return nullcontext()
    file = Path(uri.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file.with_name(f"{file.name}.lock"))


class Tracker:
    """Writes one run. `log` returns at once: a thread sends what is queued, in order, and tries until it is stored.

    Every record is also appended to `metrics.jsonl` in the run's folder, whatever becomes of the server.
    """

    def __init__(self, client: MlflowClient, uri: str, run_id: str, record: Path) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = client
        self._queue: deque[Metric | RunTag] = deque()
        self._change = threading.Condition()
        self._closing = False
        self._give_up = threading.Event()
        self._record = record.open("a", encoding="utf-8")
        self._thread = threading.Thread(target=self._send, name="tracker", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        config: RunConfig,
        *,
        run_dir: Path,
        run_name: str,
        params: dict[str, object],
        tags: dict[str, str],
        figures: Mapping[str, Figure] = MappingProxyType({}),
        run_id: str | None = None,
    ) -> "Tracker":
        """Creates the run, or continues `run_id`, and logs the config, `params`, `tags`, `figures` and versions.

        MLflow does not let a logged parameter change: on a continued run a changed one becomes the tag `changed.KEY`.

        Raises:
            UserError: the store does not answer, or refuses the experiment or the run.
        """
        uri = tracking_uri(config)
        client = connect(uri)
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            if run_id is None:
                experiment = _experiment(client, config, uri)
                run_id = client.create_run(experiment, run_name=run_name).info.run_id
            else:
                client.update_run(run_id, status="RUNNING")
            _describe(client, run_id, _flat(config.model_dump(mode="json")) | params, tags | _environment())
            client.log_text(run_id, config.to_yaml(), "config.yaml")
            for file, figure in figures.items():
                client.log_figure(run_id, figure, file)
        except MlflowException as error:
            raise UserError(f"MLflow at {shown(uri)} refused the run: {_first_line(error, uri)}") from error
        return cls(client, uri, run_id, run_dir / "metrics.jsonl")

    def log(self, metrics: dict[str, float], samples_seen: int) -> None:
        """Queues numbers, taken now at `samples_seen` samples, which is MLflow's step."""
        now_ms = time.time_ns() // 1_000_000
        line = {"time_ms": now_ms, "samples_seen": samples_seen} | metrics
        self._record.write(json.dumps(line) + "\n")
        self._record.flush()
        with self._change:
            self._queue.extend(Metric(key, float(value), now_ms, samples_seen) for key, value in metrics.items())
            self._change.notify()

    def tag(self, key: str, value: str) -> None:
        """Queues a tag."""
        with self._change:
            self._queue.append(RunTag(key, value))
            self._change.notify()

    def attach(self, file: Path, folder: str | None = None) -> None:
        """Adds a file to the run's artifacts, if the store takes it now; the file itself stays where it is."""
        with suppress(MlflowException, OSError):
            self._client.log_artifact(self.run_id, str(file), folder)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"], timeout_s: float = 60) -> int:
        """Sends what is queued, ends the run, and returns how many numbers the store did not take in time."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(timeout_s)
        self._give_up.set()
        self._record.close()
        try:
            self._client.set_terminated(self.run_id, status)
        except (MlflowException, OSError):
            return max(1, len(self._queue))
        return len(self._queue)

    def _send(self) -> None:
        failures = 0
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._closing)
                batch = [self._queue[i] for i in range(min(len(self._queue), MAX_METRICS_PER_BATCH))]
            if not batch:
                return
            try:
                metrics = [entry for entry in batch if isinstance(entry, Metric)]
                tags = [entry for entry in batch if isinstance(entry, RunTag)]
                self._client.log_batch(self.run_id, metrics=metrics, tags=tags)
            except (MlflowException, OSError):
                if self._give_up.wait(_RETRY_S[min(failures, len(_RETRY_S) - 1)]):
                    return
                failures += 1
                continue
            failures = 0
            with self._change:
                for _ in batch:
                    self._queue.popleft()


def _experiment(client: MlflowClient, config: RunConfig, uri: str) -> str:
    """The experiment's id; beside a SQLite file its artifacts go to the folder `mlartifacts`."""
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        path = uri.removeprefix("sqlite:///")
        location = (Path(path).parent / "mlartifacts").as_uri() if path != uri else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another driver may have been first
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(f"tracking.experiment={name} is deleted in {shown(uri)}: restore it, or choose another name.")
    return found.experiment_id


def _describe(client: MlflowClient, run_id: str, params: dict[str, object], tags: dict[str, str]) -> None:
    logged = client.get_run(run_id).data.params
    texts = {key: str(value)[:MAX_PARAM_VAL_LENGTH] for key, value in params.items()}
    new = [Param(key, text) for key, text in texts.items() if key not in logged]
    changed = {f"changed.{key}": text for key, text in texts.items() if key in logged and logged[key] != text}
    for part in _parts(new, MAX_PARAMS_TAGS_PER_BATCH):
        client.log_batch(run_id, params=part)
    for part in _parts([RunTag(k, v) for k, v in (tags | changed).items()], MAX_PARAMS_TAGS_PER_BATCH):
        client.log_batch(run_id, tags=part)


def _environment() -> dict[str, str]:
    """Versions of the packages, and the commit of the code where it lies in a git checkout."""
    tags = {f"version.{name}": importlib.metadata.version(name) for name in _PACKAGES}
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return tags
    return tags | {"mlflow.source.git.commit": commit.stdout.strip(), "git.dirty": str(bool(changes.stdout)).lower()}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _parts(items: Sequence[_T], size: int) -> Iterable[Sequence[_T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _first_line(error: Exception, uri: str) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].replace(uri, shown(uri))
