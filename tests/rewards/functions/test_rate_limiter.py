"""The rate limiter: requests are evenly spaced, and a pause holds back all of them. The clock is simulated."""

import asyncio

import pytest
from helpers.simulated_clock import SimulatedClock

from quarkrl.rewards.functions.rate_limiter import RateLimiter, SystemClock


def times_of_requests(limiter, clock, count):
    """When each of `count` concurrent requests may be sent."""
    times = []

    async def request():
        await limiter.wait()
        times.append(clock.now())

    async def all_requests():
        await asyncio.gather(*(request() for _ in range(count)))

    asyncio.run(all_requests())
    return times


def test_concurrent_requests_are_evenly_spaced():
    clock = SimulatedClock()
    limiter = RateLimiter(25, clock)
    assert times_of_requests(limiter, clock, 5) == pytest.approx([0, 0.04, 0.08, 0.12, 0.16])
    assert times_of_requests(limiter, clock, 2) == pytest.approx([0.20, 0.24])  # A later batch continues the spacing.


def test_unused_time_allows_no_burst():
    clock = SimulatedClock()
    limiter = RateLimiter(10, clock)
    clock.time = 100.0
    assert times_of_requests(limiter, clock, 3) == pytest.approx([100, 100.1, 100.2])


def test_without_a_limit_nothing_waits():
    clock = SimulatedClock()
    assert times_of_requests(RateLimiter(None, clock), clock, 9) == [0] * 9


def test_a_pause_holds_back_all_requests_and_a_shorter_one_does_not_end_it():
    clock = SimulatedClock()
    limiter = RateLimiter(None, clock)
    limiter.pause(30)
    limiter.pause(1)
    assert times_of_requests(limiter, clock, 3) == [30] * 3


def test_the_system_clock_never_decreases():
    clock = SystemClock()
    before = clock.now()
    asyncio.run(clock.sleep(0.01))
    assert clock.now() >= before
