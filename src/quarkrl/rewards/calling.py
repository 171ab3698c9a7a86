"""A call that may hang, in a thread of its own: a thread cannot be killed, but nobody has to wait for it."""

import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch


class InThread:
    """Begins a call in a daemon thread, which does not keep the process alive when it hangs.

    Args:
        call: what to do; it finds the current GPU of the thread that is here.
    """

    def __init__(self, call: Callable[[], Any]):
        self._outcome: Future[Any] = Future()
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # -1: none

        def run() -> None:
            try:
                torch.cuda.set_device(gpu)
                self._outcome.set_result(call())
            except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
                self._outcome.set_exception(error)

        self._thread = threading.Thread(target=run, name="reward", daemon=True)
        self._thread.start()

    def ended(self, seconds: float) -> bool:
        """Whether the call has ended; waits so long for it, at most."""
        return not wait([self._outcome], seconds).not_done

    def result(self) -> Any:
        """What the call returned, or raises what it raised; waits for it."""
        return self._outcome.result()

    def place(self, file: str | None) -> str:
        """The line of `file` that the call has come to, as " (file:line)"; "" where it is not in that file."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        found = [f for f in traceback.extract_stack(frame) if f.filename == file] if frame else []
        return f" ({found[-1].filename}:{found[-1].lineno})" if found else ""
