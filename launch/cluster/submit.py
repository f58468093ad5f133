"""Submits a training run as a Ray job, with its code and resolved config."""

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
_MAX_BYTES = 20_000_000
_STOP_WAIT_S = "120"  # from SIGTERM to SIGKILL; Ray's default of 3 s is too short for a checkpoint


@dataclass(frozen=True)
class JobOptions:
    """Options of `densenet submit`.

    Attributes:
        address: The dashboard's URL.
        install_environment: Whether the nodes install the locked packages.
        env: `NAME=VALUE` pairs for the job.
        secrets: Names of environment variables that must be set on the cluster.
        wait: Whether the job waits for its resources.
    """

    address: str
    install_environment: bool
    env: tuple[str, ...]
    secrets: tuple[str, ...]
    wait: bool


def submit(config: RunConfig, options: JobOptions) -> tuple[JobSubmissionClient, str]:
    """Submits the training run of a config whose `run.name` is set; returns the cluster's client and the job's id.

    Raises:
        UserError: Bad input, an unreachable cluster, or another job that trains the same run.
    """
    _check_locations(config)
    env = _job_env(options.env)
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
        env.setdefault("RAY_JOB_STOP_WAIT_TIME_S", _STOP_WAIT_S)
        if options.secrets:
            env[SECRETS] = ",".join(options.secrets)
        runtime_env: dict[str, Any] = {"working_dir": folder, "env_vars": env}
        if options.install_environment:
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
    """Copies the job's code, its plugin files as modules, and its config as one file to `folder`.

    Raises:
        UserError: The files exceed the limit; the message names the largest.
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
    if total > _MAX_BYTES:
        largest = listed([f"{p.relative_to(folder)} ({p.stat().st_size:,} bytes)" for p in files])
        raise UserError(f"the job's code has {total:,} bytes, {_MAX_BYTES:,} are allowed; the largest: {largest}.")


def locked_requirements() -> list[str]:
    """Returns the packages of the lock file as `NAME==VERSION`."""
    text = Path(__file__).with_name("requirements.lock").read_text(encoding="utf-8")
    return [match.strip() for match in re.findall(r"^[A-Za-z0-9][^\\\n]*", text, re.MULTILINE)]


def _check_locations(config: RunConfig) -> None:
    """Raises `UserError` if a path is relative: the nodes open it, in other working folders."""
    for key, mark, location in locations(config):
        path = location.removeprefix("sqlite:///") if mark.kind == "store" else location
        if key != "run.plugins" and not is_uri(path) and not Path(path).is_absolute():
            raise UserError(
                f"{key}={location} must be an absolute path or a URI: the cluster's nodes open it, and Ray deletes a "
                f"job's working folder at its end."
            )


def _job_env(pairs: tuple[str, ...]) -> dict[str, str]:
    """Returns the job's environment variables: the NAME=VALUE pairs, and this shell's MLflow URIs."""
    variables = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise UserError(f"--env {pair} is not of the form NAME=VALUE.")
        variables[name] = value
    try:
        Cluster(env=variables)
    except ValueError as error:
        raise UserError(f"--env: {listed(sorted(variables))}: use --secret NAME for passwords and tokens.") from error
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
