"""Ray jobs: lists, logs and stops them."""

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from aiohttp import ClientError
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pipeline.errors import UserError

_RETRY_S = 2.0
_RECONNECT_TIMEOUT_S = 300.0  # for an unreachable dashboard while a job's logs are followed
_STOP_TIMEOUT_S = 150.0


def connect(address: str) -> JobSubmissionClient:
    """Returns a client for the cluster whose dashboard is at `address`, for example `http://host:8265`.

    Raises:
        UserError: The dashboard is unreachable, has another version of Ray, or requires a token that is not set.
    """
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (ValueError, RuntimeError, OSError, RayError) as error:  # Ray's, and those of its HTTP library
        reason = str(error).strip().splitlines()
        text = reason[0] if reason else type(error).__name__
        if any(word in str(error).lower() for word in ("401", "403", "token", "unauthorized")):
            raise UserError(
                f"the cluster at {address} requires a token: put the cluster's token into ~/.ray/auth_token, its path "
                f"into RAY_AUTH_TOKEN_PATH, or the token itself into RAY_AUTH_TOKEN ({text})"
            ) from error
        raise UserError(
            f"no Ray dashboard is reachable at {address}: {text} Pass its URL, for example http://HOST:8265; "
            f"`kubectl port-forward` or an SSH tunnel reaches one inside a cluster."
        ) from error


def list_jobs(address: str) -> list[JobDetails]:
    """Returns the cluster's submitted jobs, newest first."""
    jobs = sorted(connect(address).list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
    return [job for job in jobs if job.submission_id is not None]  # without one: a driver that was not submitted


def print_logs(address: str, job: str, follow: bool) -> int:
    """Prints a job's logs, with `follow` until its end; returns the job's exit code then, else 0.

    Raises:
        UserError: The job does not exist, or the cluster is unreachable.
    """
    client = connect(address)
    _status(client, job)
    if follow:
        return follow_job(client, job)
    sys.stdout.write(client.get_job_logs(job))
    return 0


def stop_job(address: str, job: str, log: Callable[[str], object]) -> None:
    """Stops a job by SIGTERM, so that a training run writes a checkpoint; waits for its end.

    Raises:
        UserError: The job does not exist, or the cluster is unreachable.
    """
    client = connect(address)
    if _status(client, job).is_terminal():
        log(f"{job} has ended already")
        return
    stop(client, job, log)


def stop(client: JobSubmissionClient, job: str, log: Callable[[str], object]) -> None:
    """Requests a job's stop, and waits for its end."""
    client.stop_job(job)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            log(f"{job} is still stopping; `densenet jobs list` shows its status")
            return
        time.sleep(0.5)
    log(f"{job} is stopped")


def follow_job(client: JobSubmissionClient, job: str) -> int:
    """Prints a job's logs until its end, and reconnects after lost connections; returns its exit code."""
    logs, lost_at = _LogFollower(), None
    while True:
        try:
            asyncio.run(logs.follow(client, job))
            details = client.get_job_info(job)
            if details.status.is_terminal():
                return _exit_code(details)
            lost_at = None
        except (RuntimeError, OSError, ClientError) as error:  # Ray's, and those of its HTTP libraries
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _RECONNECT_TIMEOUT_S:
                raise UserError(
                    f"the dashboard was unreachable for {_RECONNECT_TIMEOUT_S:g} s ({type(error).__name__}); the job "
                    f"{job} may still run: `densenet jobs logs {job} --follow` shows it when the dashboard is back."
                ) from error
        time.sleep(_RETRY_S if lost_at else 0.2)


class _LogFollower:
    """Prints each character of a job's logs once, over any number of connections."""

    def __init__(self) -> None:
        self._printed = 0

    async def follow(self, client: JobSubmissionClient, job: str) -> None:
        """Prints what is new until the connection ends; each connection sends the logs from their start."""
        received = 0
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text[max(0, self._printed - received) :])
            sys.stdout.flush()
            received += len(text)
            self._printed = max(self._printed, received)


def _exit_code(details: Any) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 143
    if details.driver_exit_code is None:
        sys.stdout.write(f"{details.message}\n")
    return details.driver_exit_code or 1


def _status(client: JobSubmissionClient, job: str) -> JobStatus:
    try:
        return client.get_job_status(job)
    except RuntimeError as error:
        known = [details.submission_id for details in client.list_jobs() if details.submission_id]
        raise UserError(f"there is no job {job}; the jobs are: {', '.join(known) or 'none'}.") from error
