"""A training as a Ray job, with exactly the code and the config that it needs."""

import datetime
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

from launch.cluster.job_env import SECRETS
from launch.cluster.jobs import connect
from pipeline.config import Cluster, RunConfig, Tracking
from pipeline.errors import UserError, listed
from pipeline.locations import is_uri, locations
from pipeline.plugins import is_file, module_name
from pipeline.tracking.provenance import write_commit
from pipeline.tracking.stores import REGISTRY_VARIABLE, TRACKING_VARIABLE

PROJECT = Path(__file__).parents[2]
_CODE = ("pipeline", "launch")
_CONFIG = "job.yaml"
_MOST_BYTES = 20_000_000
_STOP_WAIT_S = "120"  # between a job's SIGTERM and its SIGKILL; Ray's 3 s are too short for a checkpoint


@dataclass(frozen=True)
class JobOptions:
    """What the user asked for besides the config."""

    address: str
    environment: bool
    env: tuple[str, ...]
    secrets: tuple[str, ...]
    wait: bool


def submit(config: RunConfig, options: JobOptions) -> tuple[JobSubmissionClient, str]:
    """Submits the training of a config that has its run's name; returns the cluster's client, and the job's id.

    Raises:
        UserError: bad input, no cluster, or a job there that trains the same run.
    """
    _check_locations(config)
    variables = _variables(options.env)
    client = connect(options.address)
    run_name = str(config.run.name)
    for details in client.list_jobs():
        if (details.metadata or {}).get("run") == run_name and not details.status.is_terminal():
            raise UserError(
                f"the job {details.submission_id} trains run.name={run_name} already: "
                f"`densenet jobs stop {details.submission_id}` ends it, or choose another run.name."
            )
    job = f"{run_name}-{datetime.datetime.now():%m%d%H%M%S}"
    with tempfile.TemporaryDirectory() as folder:
        package(Path(folder), config)
        variables.setdefault("RAY_JOB_STOP_WAIT_TIME_S", _STOP_WAIT_S)
        if options.secrets:
            variables[SECRETS] = ",".join(options.secrets)
        runtime_env: dict[str, Any] = {"working_dir": folder, "env_vars": variables}
        if options.environment:
            runtime_env["pip"] = {"packages": locked_requirements(), "pip_check": False}
        wait = " --wait" if options.wait else ""
        try:
            client.submit_job(
                entrypoint=f"python -m launch.cli train {_CONFIG}{wait}",
                submission_id=job,
                runtime_env=runtime_env,
                metadata={"run": run_name},
            )
        except RuntimeError as error:
            raise UserError(f"the cluster refused the job: {str(error).strip().splitlines()[-1]}") from error
    return client, job


def package(folder: Path, config: RunConfig) -> None:
    """Copies what a job needs: the code, files of plugins, which are modules there, and the config as one file.

    Raises:
        UserError: it is larger than a job's code ought to be; the largest files are named.
    """
    for name in _CODE:
        for source in (PROJECT / name).rglob("*.py"):
            target = folder / source.relative_to(PROJECT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for plugin in filter(is_file, config.run.plugins):
        shutil.copyfile(Path(plugin).expanduser(), folder / f"{module_name(plugin)}.py")
    plugins = tuple(module_name(plugin) for plugin in config.run.plugins)
    config = config.model_copy(update={"run": config.run.model_copy(update={"plugins": plugins})})
    (folder / _CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    write_commit(folder)
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size, reverse=True)
    total = sum(file.stat().st_size for file in files)
    if total > _MOST_BYTES:
        largest = listed([f"{p.relative_to(folder)} ({p.stat().st_size:,} bytes)" for p in files])
        raise UserError(f"the job's code has {total:,} bytes, {_MOST_BYTES:,} are allowed; the largest: {largest}.")


def locked_requirements() -> list[str]:
    """The lock file's packages with their versions."""
    text = Path(__file__).with_name("requirements.lock").read_text(encoding="utf-8")
    return [match.strip() for match in re.findall(r"^[A-Za-z0-9][^\\\n]*", text, re.MULTILINE)]


def _check_locations(config: RunConfig) -> None:
    """Raises where a path does not say where it begins: it is of the cluster's nodes."""
    for key, mark, place in locations(config):
        path_of = place.removeprefix("sqlite:///") if mark.kind == "store" else place
        if key != "run.plugins" and not is_uri(path_of) and not Path(path_of).is_absolute():
            raise UserError(
                f"{key}={place} must be an absolute path, or an address: it is looked for on the nodes, and a job's "
                f"own folder is thrown away at its end."
            )


def _variables(given: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE pairs for the job, and the addresses of MLflow in this shell."""
    variables = {}
    for pair in given:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise UserError(f"--env {pair} is not of the form NAME=VALUE.")
        variables[name] = value
    try:
        Cluster(env=variables)
    except ValueError as error:
        raise UserError(f"--env: {listed(sorted(variables))}: use --secret NAME for what must not be shown.") from error
    for name in (TRACKING_VARIABLE, REGISTRY_VARIABLE):
        uri = os.environ.get(name)
        if uri and uri.startswith("http"):
            try:
                variables.setdefault(name, str(Tracking(uri=uri).uri))
            except ValueError as error:
                raise UserError(
                    f"{name} holds a password, which is not sent: set it on the nodes, or use "
                    f"--secret MLFLOW_TRACKING_PASSWORD."
                ) from error
    return variables
