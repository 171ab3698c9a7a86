"""A simulated clock for rewards over HTTP: waits take no real time, and their lengths are exact."""

import asyncio

TURNS = 60  # More turns of the event loop than a simulated request needs.


class SimulatedClock:
    """The time in seconds. It advances, to the earliest moment that is waited for, when all tasks wait."""

    def __init__(self):
        self.time = 0.0
        self.wake_times: list[float] = []

    def now(self):
        return self.time

    async def sleep(self, seconds):
        wake_time = self.time + seconds
        self.wake_times.append(wake_time)
        try:
            await asyncio.sleep(0)
            while self.time < wake_time:
                for _ in range(TURNS):
                    await asyncio.sleep(0)
                self.time = max(self.time, min(self.wake_times))
        finally:
            self.wake_times.remove(wake_time)
