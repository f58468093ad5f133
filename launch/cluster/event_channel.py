"""What workers and controller tell the driver, and what it asks of them: a small actor in between."""

import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import UserError
from pipeline.train.events import Event, Failed, Report, WorkersLost, WorkersStarted

_POLL_S = 0.2
_NAMESPACE = "densenet"
_LONGEST_CAUSE = 160
_GONE_S = 20  # an ended driver's actors may be there for some seconds


@ray.remote(num_cpus=0)
class EventChannel:
    """Carries events to the driver, and remembers the first error."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._error: str | None = None
        self._stop = False

    def push(self, event: Event) -> None:
        """Takes an event from a worker; of errors the first is kept."""
        self._events.append(event)
        if isinstance(event, Failed) and self._error is None:
            self._error = event.message

    def drain(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def error(self) -> str | None:
        """The first worker's error that the user can fix, if there was one."""
        return self._error

    def ask_to_stop(self) -> None:
        """Makes the workers end after a checkpoint, when they next look."""
        self._stop = True

    def stop_asked(self) -> bool:
        """Whether the workers are to end."""
        return self._stop


class WorkerFailureCallback(UserCallback):
    """Tells the hub which workers were lost, and why; runs in Ray Train's controller."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Tells the hub which workers were lost, and why; Ray Train calls it before it starts them again."""
        if ray.get(self._hub.error.remote()) is not None:
            return  # the user's to fix, and told as that
        causes = {rank: _cause(error) for rank, error in worker_exceptions.items()}
        ray.get(self._hub.push.remote(WorkersLost(causes)))


def _cause(error: Exception) -> str:
    """The last line of an error's text, in short; Ray's own tell of a lost process in many words."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, ray.exceptions.RayActorError) or "The actor" in str(error):
        return "its process or its node has gone"
    if any(word in lines[-1] for word in ("gloo", "NCCL", "by peer")):
        return "its connection to another worker broke"
    return textwrap.shorten(lines[-1], _LONGEST_CAUSE, placeholder=" ...")


def open_event_channel(run_name: str) -> Any:
    """A hub under the run's name, on the driver's node: it must not go with another one.

    Raises:
        UserError: another driver on the cluster trains a run of this name.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    deadline = time.monotonic() + _GONE_S
    while True:
        try:
            options = {"name": run_name, "namespace": _NAMESPACE, "scheduling_strategy": here}
            return EventChannel.options(**options).remote()  # type: ignore[attr-defined]
        except ValueError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"run.name={run_name} is being trained by another driver on this cluster: wait for its end, or "
                    f"choose another run.name."
                ) from error
            time.sleep(_POLL_S)


def pump(hub: Any, on_event: Report, done: threading.Event, timeout_s: float, late: Callable[[], None]) -> None:
    """Passes the hub's events on until `done` is set and the hub is empty, or has gone with its node.

    `late` is called once when workers were wanted for so long and have not come.
    """
    wanted_at: float | None = time.monotonic()
    while True:
        finished = done.wait(_POLL_S)
        try:
            events = ray.get(hub.drain.remote())
        except ray.exceptions.RayError:
            return
        for event in events:
            match event:
                case WorkersLost():
                    wanted_at = time.monotonic()
                case WorkersStarted():
                    wanted_at = None
            on_event(event)
        if finished:
            return
        if wanted_at is not None and time.monotonic() > wanted_at + timeout_s:
            wanted_at = None
            late()
