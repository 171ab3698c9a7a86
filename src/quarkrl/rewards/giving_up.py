"""Clean up after a reward that exceeds its time-out: kill its child processes, and end a frozen process."""

import faulthandler
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

# The clock of `psutil` is that of the last boot, which Linux gives in whole seconds.
_CLOCK_ERROR = 1.0
FROZEN_SECONDS = 5.0  # How much later than its time-out a frozen process is ended.


def kill_children(since: float) -> None:
    """Kill the child processes that this process has started since a time (`time.time()`), and their children."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # It has just ended.
            if child.create_time() >= since - _CLOCK_ERROR:
                child.kill()


@contextmanager
def end_frozen_process(timeout: float | None) -> Iterator[None]:
    """End the process, with the stacks of its threads, if this context lasts `FROZEN_SECONDS` more than a time-out.

    C code that never releases Python's global lock stops all threads, those that would notice a time-out included. A
    regular expression that backtracks without end is such code. The thread of `faulthandler` does not need the lock.
    """
    descriptor = None
    if timeout is not None and timeout + FROZEN_SECONDS < threading.TIMEOUT_MAX and sys.__stderr__ is not None:
        with suppress(OSError, ValueError):  # Standard error is closed, or not a file.
            descriptor = sys.__stderr__.fileno()
    if timeout is None or descriptor is None:
        yield
        return
    faulthandler.dump_traceback_later(timeout + FROZEN_SECONDS, exit=True, file=descriptor)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
