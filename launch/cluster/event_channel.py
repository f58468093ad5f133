"""The event channel, a small actor: workers and controller send events to the driver, which can request a stop."""

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import UserError
from pipeline.train.events import Event, Failed, Report, WorkersLost, WorkersStarted

_POLL_S = 0.2
_NAMESPACE = "densenet"
_STALE_ACTOR_S = 20  # an ended driver's actors may exist for some seconds


@ray.remote(num_cpus=0)
class EventChannel:
    """Queues events for the driver, and stores the first error."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._error: str | None = None
        self._stop = False

    def push(self, event: Event) -> None:
        """Adds an event of a worker; stores the message of the first `Failed`."""
        self._events.append(event)
        if isinstance(event, Failed) and self._error is None:
            self._error = event.message

    def drain(self) -> list[Event]:
        """Returns the events since the last call."""
        events, self._events = self._events, []
        return events

    def error(self) -> str | None:
        """Returns the first error of a worker that the user can fix, or None."""
        return self._error

    def request_stop(self) -> None:
        """Makes the workers end after a checkpoint, at their next check."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Returns whether the workers must end."""
        return self._stop


def open_event_channel(run_name: str) -> Any:
    """Creates the run's event channel on the driver's node, so that the loss of another node does not end it.

    Raises:
        UserError: Another driver on the cluster trains a run of this name.
    """
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    deadline = time.monotonic() + _STALE_ACTOR_S
    while True:
        try:
            options = {"name": run_name, "namespace": _NAMESPACE, "scheduling_strategy": driver_node}
            return EventChannel.options(**options).remote()  # type: ignore[attr-defined]
        except ValueError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"run.name={run_name} is being trained by another driver on this cluster: wait for its end, or "
                    f"choose another run.name."
                ) from error
            time.sleep(_POLL_S)


def forward_events(
    channel: Any, on_event: Report, done: threading.Event, timeout_s: float, on_timeout: Callable[[], None]
) -> None:
    """Passes the channel's events to `on_event` until `done` is set and the channel is empty or lost with its node.

    Calls `on_timeout` once if the workers do not start, or restart, within `timeout_s`.
    """
    waiting_since: float | None = time.monotonic()
    while True:
        finished = done.wait(_POLL_S)
        try:
            events = ray.get(channel.drain.remote())
        except ray.exceptions.RayError:
            return
        for event in events:
            match event:
                case WorkersLost():
                    waiting_since = time.monotonic()
                case WorkersStarted():
                    waiting_since = None
            on_event(event)
        if finished:
            return
        if waiting_since is not None and time.monotonic() > waiting_since + timeout_s:
            waiting_since = None
            on_timeout()
