"""`RateLimiter`: at most so many requests per second, and pauses that a server demands."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """The time that rate limits, waits and time budgets are measured in. Tests replace it by a simulated one."""

    def now(self) -> float:
        """Seconds since an arbitrary moment; never decreases."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait so many seconds."""
        ...


class SystemClock:
    """The clock of the operating system."""

    def now(self) -> float:
        """`time.monotonic`."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """`asyncio.sleep`."""
        await asyncio.sleep(seconds)


class RateLimiter:
    """A token bucket that holds one token, so that requests are evenly spaced and never sent in a burst.

    Args:
        per_second: the largest number of requests per second; None sets no limit.
        clock: the source of time.
    """

    def __init__(self, per_second: float | None, clock: Clock):
        self._interval = 1 / per_second if per_second else 0.0
        self._clock = clock
        self._next_request = 0.0  # The time from which on the next request may be sent.

    async def wait(self) -> None:
        """Wait until a request may be sent, and reserve that moment."""
        while (seconds := self._next_request - self._clock.now()) > 0:
            await self._clock.sleep(seconds)
        self._next_request = self._clock.now() + self._interval

    def pause(self, seconds: float) -> None:
        """Hold back all requests for at least so many seconds from now."""
        self._next_request = max(self._next_request, self._clock.now() + seconds)
