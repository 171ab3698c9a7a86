"""SIGTERM and Ctrl-C as a wish to stop, granted where nothing is lost: after the batch at hand."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A run has saved its state and ended because a signal asked for it.

    Attributes:
        code: what a command ends with: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


class Interrupts:
    """Notes SIGTERM and SIGINT while `watched`.

    Attributes:
        asked: the signal that came; None if none has.
        at_once: what a second SIGINT does: end the process here and now, or (default) raise KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.at_once = False

    def pending(self) -> bool:
        """Whether a signal has come."""
        return self.asked is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Catch the signals in here; only the main thread may, elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.asked = None
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked is not None:
            if self.at_once:  # All that is finished is on the disk, and a scorer that hangs must not hold us.
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"stopped at once\n")
                os._exit(128 + number)
            raise KeyboardInterrupt
        self.asked = number
