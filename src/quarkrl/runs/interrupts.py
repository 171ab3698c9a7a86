"""SIGTERM and Ctrl-C as requests to stop, which a run honours after the current batch, so that nothing is lost."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A run has saved its state and ended because a signal requested it.

    Attributes:
        code: the exit code of a command: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.code = 128 + signal_number


class Interrupts:
    """Records SIGTERM and SIGINT while `watched` is active, and forgets them afterwards.

    Attributes:
        signal_number: the signal that was received; None if none was.
        at_once: what a second SIGINT does: True ends the process immediately, False raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.at_once = False

    def pending(self) -> bool:
        """Return whether a signal was received."""
        return self.signal_number is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handle the signals inside the context. Only the main thread can; in other threads nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signal_number = None
        handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.signal_number = None  # A caller that catches `Stopped` may use the trainer again.

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        if signal_number == signal.SIGINT and self.signal_number is not None:
            if self.at_once:  # Finished batches are on the disk, and a reward function may never return.
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"stopped at once\n")
                os._exit(128 + signal_number)
            raise KeyboardInterrupt
        self.signal_number = signal_number
