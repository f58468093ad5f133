"""The driver's handlers of the signals that end a run."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signal_handler(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Sets the handler of SIGTERM and SIGHUP, except for a signal that is ignored, as SIGHUP under `nohup`."""
    if threading.current_thread() is not threading.main_thread():  # a trial of a sweep
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)
