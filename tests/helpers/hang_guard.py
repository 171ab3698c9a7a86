"""A guard against code that never ends: the test fails instead of the whole run of the tests."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def raises_if_it_hangs(seconds: int = 60) -> Iterator[None]:
    """Raise TimeoutError in the main thread after `seconds`. A regular expression is interrupted, too."""

    def stop(_number, _frame):
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
