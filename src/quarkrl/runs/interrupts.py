"""SIGTERM and Ctrl-C as requests to stop, which a run honours after the current batch, so that nothing is lost."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# The handlers that `watched` contexts have replaced, the outermost first.
_replaced: list[dict[int, Any]] = []
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
        exit_on_second_sigint: True ends the process at a second SIGINT; False raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.exit_on_second_sigint = False

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
        handlers: dict[int, Any] = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        _replaced.append(handlers)
        try:
            yield
        finally:
            _replaced.remove(handlers)
            _restore(handlers)
            self.signal_number = None  # A caller that catches `Stopped` may use the trainer again.

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        if signal_number == signal.SIGINT and self.signal_number is not None:
            if self.exit_on_second_sigint:  # Finished batches are on the disk, and a reward function may never return.
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"stopped at once\n")
                os._exit(128 + signal_number)
            raise KeyboardInterrupt
        self.signal_number = signal_number


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: installed by C code.


class _Fork:
    """Gives a forked child the handlers from before `watched`. A child that only records SIGTERM cannot be ended.

    A child of the main thread, such as a worker of a `DataLoader`, keeps SIGINT. Ctrl-C reaches it too, and the run
    needs it until the current batch ends.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []  # The signals whose handlers the child restores.
        self._mask: Any = None

    def before(self) -> None:
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._numbers = [n for n in _SIGNALS if _replaced and not (in_main_thread and n == signal.SIGINT)]
        # A signal to the child before it has its handlers waits until it has them.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)

    def in_child(self) -> None:
        for handlers in reversed(_replaced):
            _restore({number: handlers[number] for number in self._numbers})
        _replaced.clear()
        self.in_parent()

    def in_parent(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


if hasattr(os, "register_at_fork"):  # Not on Windows, which has no fork.
    _fork = _Fork()
    os.register_at_fork(before=_fork.before, after_in_child=_fork.in_child, after_in_parent=_fork.in_parent)
