"""Sends worker failures to the event channel, with their causes."""

import textwrap
from typing import Any

import ray
from ray.train import UserCallback

from pipeline.train.events import WorkersLost

_MAX_CAUSE_LENGTH = 160


class WorkerFailureCallback(UserCallback):
    """Sends worker failures, with their causes, to the event channel; runs in Ray Train's controller."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Sends the failed workers and the causes; Ray Train calls this before it restarts the workers."""
        if ray.get(self._channel.error.remote()) is not None:
            return  # an error that the user must fix, reported already
        causes = {rank: _failure_cause(error) for rank, error in worker_exceptions.items()}
        ray.get(self._channel.push.remote(WorkersLost(causes)))


def _failure_cause(error: Exception) -> str:
    """Returns the last line of an error's text, shortened, or a short text for Ray's long ones of a lost process."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, ray.exceptions.RayActorError) or "The actor" in str(error):
        return "its process or node died"
    if any(word in lines[-1] for word in ("gloo", "NCCL", "by peer")):
        return "its connection to another worker broke"
    return textwrap.shorten(lines[-1], _MAX_CAUSE_LENGTH, placeholder=" ...")
