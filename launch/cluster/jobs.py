"""Ray jobs: listing and stopping them, and following one to its end."""

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
_PATIENCE_S = 300.0  # for a dashboard that does not answer, while a job is followed
_STOP_S = 150.0


def connect(address: str) -> JobSubmissionClient:
    """A client for the cluster whose dashboard is at `address`, as `http://host:8265`.

    Raises:
        UserError: nothing answers there, it wants a token that is not here, or it is of another version.
    """
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (ValueError, RuntimeError, OSError, RayError) as error:  # Ray's, and those of its HTTP library
        reason = str(error).strip().splitlines()
        text = reason[0] if reason else type(error).__name__
        if any(word in str(error).lower() for word in ("401", "403", "token", "unauthorized")):
            raise UserError(
                f"the cluster at {address} wants a token: put the cluster's into ~/.ray/auth_token, or its path into "
                f"RAY_AUTH_TOKEN_PATH, or itself into RAY_AUTH_TOKEN ({text})"
            ) from error
        raise UserError(
            f"no Ray dashboard answers at {address}: {text} Give its address, as http://HOST:8265; "
            f"`kubectl port-forward` or an SSH tunnel reaches one inside a cluster."
        ) from error


def submitted(address: str) -> list[JobDetails]:
    """The jobs that the cluster knows, newest first."""
    jobs = sorted(connect(address).list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
    return [job for job in jobs if job.submission_id is not None]  # without one: a driver that joined by itself


def print_logs(address: str, job: str, follow: bool) -> int:
    """Prints what a job has printed, and goes on to its end with `follow`; returns the job's exit code then, else 0.

    Raises:
        UserError: there is no such job, or no cluster.
    """
    client = connect(address)
    _status(client, job)
    if follow:
        return follow_job(client, job)
    sys.stdout.write(client.get_job_logs(job))
    return 0


def stop_job(address: str, job: str, told: Callable[[str], object]) -> None:
    """Stops a job: SIGTERM first, so that a training writes a checkpoint; waits for its end.

    Raises:
        UserError: there is no such job, or no cluster.
    """
    client = connect(address)
    if _status(client, job).is_terminal():
        told(f"{job} has ended already")
        return
    stop(client, job, told)


def stop(client: JobSubmissionClient, job: str, told: Callable[[str], object]) -> None:
    """Asks a job to end, and waits for it."""
    client.stop_job(job)
    deadline = time.monotonic() + _STOP_S
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            told(f"{job} is still ending; `densenet jobs list` shows when it has")
            return
        time.sleep(0.5)
    told(f"{job} is stopped")


def follow_job(client: JobSubmissionClient, job: str) -> int:
    """Prints a job's output until it ends, over lost connections; returns its exit code."""
    output, lost_at = _Output(), None
    while True:
        try:
            asyncio.run(output.follow(client, job))
            details = client.get_job_info(job)
            if details.status.is_terminal():
                return _exit_code(details)
            lost_at = None
        except (RuntimeError, OSError, ClientError) as error:  # Ray's, and those of its HTTP libraries
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _PATIENCE_S:
                raise UserError(
                    f"the dashboard has not answered for {_PATIENCE_S:g} s ({type(error).__name__}); the job {job} may "
                    f"go on: `densenet jobs logs {job} --follow` shows it when the dashboard is back."
                ) from error
        time.sleep(_RETRY_S if lost_at else 0.2)


class _Output:
    """A job's output, each character of it once, however often the connection begins anew."""

    def __init__(self) -> None:
        self._printed = 0

    async def follow(self, client: JobSubmissionClient, job: str) -> None:
        """Prints what is new until the connection ends; it begins with the output's first character each time."""
        seen = 0
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text[max(0, self._printed - seen) :])
            sys.stdout.flush()
            seen += len(text)
            self._printed = max(self._printed, seen)


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
        raise UserError(f"there is no job {job}; there are: {', '.join(known) or 'none'}.") from error
