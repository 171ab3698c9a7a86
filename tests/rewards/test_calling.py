"""Calling rewards: exceptions, async rewards, time-outs, and stopping from another thread."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.errors import error_message
from helpers.reward_helpers import IDS, PROMPTS, TEXTS, length, score
from helpers.tiny_models import make_home, tiny_tokenizer
from transformers.utils import logging

from quarkrl.cli.main import main
from quarkrl.errors import UserError
from quarkrl.models.device import current_gpu
from quarkrl.rewards import Scorer
from quarkrl.rewards.batch import Batch
from quarkrl.rewards.calling import RewardCall, RewardCaller


def rewards_of(scorer):
    return scorer(PROMPTS, TEXTS, IDS).rewards[:, 0].tolist()


def run(caller: RewardCaller, *rewards):
    """What each reward returns for TEXTS."""
    batch = Batch.of(PROMPTS, TEXTS, IDS, {}, [])
    return caller.run([RewardCall(reward.__name__, reward, batch) for reward in rewards])


@pytest.fixture
def released():
    """An event that blocks rewards until the test ends."""
    event = threading.Event()
    yield event
    event.set()


# Exceptions


def test_an_exception_in_a_reward_is_one_line_with_file_line_and_cause():
    def broken(completions):
        raise KeyError("no such\nword")

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(UserError) as caught:
        score(broken)
    assert str(caught.value) == f"reward 'broken' raised KeyError: 'no such\\nword' ({__file__}:{line})"
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [StopIteration("end"), SystemExit(0), CancelledError(), RecursionError("deep")])
def test_every_kind_of_exception_is_one_line(error):
    def broken(completions):
        raise error

    async def broken_later(completions):
        raise error if not isinstance(error, StopIteration) else ValueError("end")

    for reward in (broken, broken_later):
        assert f"reward {reward.__name__!r} raised " in error_message(lambda reward=reward: score(reward))


def test_ctrl_c_in_a_reward_is_not_swallowed():
    def interrupted(completions):
        raise KeyboardInterrupt

    async def interrupted_later(completions):
        raise KeyboardInterrupt

    for reward in (interrupted, interrupted_later):
        with pytest.raises(KeyboardInterrupt):
            score(reward)


# Async rewards


def test_async_rewards_run_concurrently_and_mix_with_plain_ones():
    running = []

    async def all_started():
        running.append(1)
        while len(running) < 3:  # If they ran one after another, the first would wait for ever.
            await asyncio.sleep(0.01)

    async def late_length(completions, **columns):
        await all_started()
        return [len(text) for text in completions]

    class AsyncObject:
        async def __call__(self, completions):
            await all_started()
            return [10.0] * len(completions)

    scores = score(late_length, length, AsyncObject(), functools.partial(late_length))
    assert scores.components.tolist() == [[1, 1, 10, 1], [2, 2, 10, 2], [0, 0, 10, 0], [4, 4, 10, 4]]


def test_async_rewards_run_inside_a_running_loop_as_in_a_notebook():
    async def late_length(completions):
        await asyncio.sleep(0.01)
        return [len(text) for text in completions]

    async def notebook(timeout):
        return score(late_length, timeout=timeout)

    for timeout in (None, 60):
        assert asyncio.run(notebook(timeout)).rewards[:, 0].tolist() == [1, 2, 0, 4]


def test_all_batches_of_a_scorer_share_one_event_loop():
    """An HTTP client that an async reward keeps would not survive the end of its loop."""
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    for timeout in (None, 60):
        scorer = Scorer(reward, timeout=timeout)
        rewards_of(scorer), rewards_of(scorer)
        assert loops[-1] is loops[-2] and not loops[-1].is_closed()


def test_an_error_in_an_async_reward_cancels_the_others():
    cancelled = []

    async def endless(completions):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    async def broken(completions):
        raise ValueError("quota")

    assert "reward 'broken' raised ValueError: quota (" in error_message(lambda: score(endless, broken))
    assert cancelled == [True]


# Stop


def test_a_call_in_another_thread_can_be_stopped_and_the_next_one_works():
    class Slow:
        is_endless = True
        started = threading.Event()

        async def __call__(self, completions):
            self.started.set()
            if self.is_endless:
                await asyncio.Event().wait()
            return [1.0] * len(completions)

    reward = Slow()
    scorer = Scorer(reward)
    scorer.stop()  # Without effect, now or later: no call is in progress.
    for _ in range(2):
        reward.is_endless = True
        reward.started.clear()
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(scorer, PROMPTS, TEXTS, IDS)
            reward.started.wait()
            scorer.stop()
            assert isinstance(future.exception(), (CancelledError, asyncio.CancelledError))
        reward.is_endless = False
        scorer.stop()
        assert rewards_of(scorer) == [1, 1, 1, 1]


def test_a_stop_while_a_plain_reward_runs_prevents_the_async_ones_from_starting():
    started, stopped, events = threading.Event(), threading.Event(), []

    def plain(completions):
        started.set()
        stopped.wait()
        events.append("plain")
        return length(completions)

    async def later(completions):
        events.append("later")
        return length(completions)

    scorer = Scorer([plain, later])
    for _ in range(2):  # The second time the event loop exists, and a cancellation waits there for its next use.
        started.clear(), stopped.clear(), events.clear()
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(scorer, PROMPTS, TEXTS, IDS)
            started.wait()
            scorer.stop()
            stopped.set()
            assert isinstance(future.exception(), CancelledError)
        assert events == ["plain"]
        assert rewards_of(scorer) == [2, 4, 0, 8] and events == ["plain", "plain", "later"]


# Time-outs and rewards that hang


def test_a_plain_function_that_hangs_is_abandoned_and_named_with_its_line(released):
    def hangs(completions):
        released.wait()
        return length(completions)

    scorer = Scorer([length, hangs], timeout=0.2)
    line = hangs.__code__.co_firstlineno + 1
    assert error_message(lambda: rewards_of(scorer)) == (
        f"reward 'hangs' did not score 4 completions within 0.2 s ({__file__}:{line}). "
        "Fix the reward or raise --reward_timeout."
    )
    assert not released.is_set()  # The error came although the function still hangs.
    message = error_message(lambda: rewards_of(scorer))
    assert message == "reward 'hangs' is still running after its time-out. Start a new process."


def test_an_async_function_that_hangs_is_cancelled_and_the_next_call_works():
    cancelled = []

    async def slow(completions):
        if not cancelled:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
        return length(completions)

    scorer = Scorer([slow, length], timeout=2)
    assert "reward 'slow' did not score 4 completions within 2 s. Fix" in error_message(lambda: rewards_of(scorer))
    assert cancelled == [True]
    assert rewards_of(scorer) == [2, 4, 0, 8]


def test_only_the_rewards_without_an_answer_are_named():
    async def quick(completions):
        return length(completions)

    async def slow(completions):
        await asyncio.Event().wait()

    message = error_message(lambda: rewards_of(Scorer([quick, slow], timeout=2)))
    assert message.startswith("reward 'slow' did not score 4 completions")


def test_an_async_function_that_blocks_or_ignores_its_cancellation_is_abandoned(released):
    async def blocks(completions):
        released.wait()

    async def ignores(completions):
        while not released.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    for reward in (blocks, ignores):
        caller = RewardCaller(timeout=0.1, grace=0.05)
        assert f"reward '{reward.__name__}' did not score 4" in error_message(lambda r=reward, c=caller: run(c, r))
        assert "is still running" in error_message(lambda r=reward, c=caller: run(c, r))


def test_a_reward_that_ends_within_the_grace_does_not_hang():
    ended = threading.Event()

    async def tidy(completions):
        try:
            if not ended.is_set():
                await asyncio.Event().wait()
        finally:
            ended.set()
        return length(completions)

    caller = RewardCaller(timeout=2, grace=60)
    assert "did not score" in error_message(lambda: run(caller, tidy))
    assert ended.is_set() and run(caller, tidy) == [[1, 2, 0, 4]]


def test_an_abandoned_call_sends_no_further_requests_when_it_returns(tmp_path, released):
    """Of three parts of 256 texts the first hangs; the other two are never sent."""
    requests = []

    class Paid:
        name = "paid"

        def __init__(self):
            self.identity = {"name": "paid"}

        def __call__(self, completions):
            requests.append(len(completions))
            released.wait()
            return length(completions)

    texts = [str(n) for n in range(600)]
    scorer = Scorer(Paid(), cache=tmp_path / "c", timeout=0.2)
    with pytest.raises(UserError, match="reward 'paid' did not score 600 completions"):
        scorer(texts, texts, [[]] * 600)
    released.set()
    for thread in threading.enumerate():
        if thread.name == "reward":
            thread.join(10)
    assert requests == [256]


@pytest.mark.parametrize("timeout", [None, 60, float("inf")])
def test_a_time_out_that_is_not_reached_changes_nothing(timeout):
    async def later(completions):
        await asyncio.sleep(0.01)
        return length(completions)

    def fails(completions):
        raise KeyError("no such")

    assert rewards_of(Scorer([later, length], timeout=timeout)) == [2, 4, 0, 8]
    with pytest.raises(UserError, match=r"reward 'fails' raised KeyError: 'no such' \(.*test_calling.py:\d+\)"):
        rewards_of(Scorer(fails, timeout=timeout))


def test_the_current_gpu_is_minus_one_without_cuda():
    import torch

    if not torch.cuda.is_initialized():
        assert current_gpu() == -1
    torch.cuda.set_device(-1)  # Ignored, on every machine.


# The command

WORDS = [*map(str, range(10, 60))]
HANGING = """
import asyncio, time

def sleeps(completions):
    time.sleep(600)

async def waits(completions):
    await asyncio.sleep(600)

async def blocks(completions):
    time.sleep(600)

def leaves(completions):
    raise SystemExit(0)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, prompts, rewards and the options of a short run."""
    return make_home(
        tmp_path_factory.mktemp("calling"),
        tiny_tokenizer(words=WORDS),
        [f"{a} {b}" for a, b in pairwise(WORDS)],
        HANGING,
        steps_per_iteration=2,
        prompts_per_iteration=24,
        generation_batch_size=8,
        max_completion_length=3,
    )


@pytest.mark.slow
def test_a_process_whose_reward_hangs_ends_with_one_line(home, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "quarkrl.cli", "train", "--config", home / "run.yaml"]
    command += ["--reward", f"{home / 'rewards.py'}:sleeps", "--reward_timeout", "0.3"]
    command += ["--output_dir", tmp_path / "run"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: reward 'sleeps' did not score 8 completions within 0.3 s (")
    assert line.endswith("rewards.py:5). Fix the reward or raise --reward_timeout.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("waits", "reward 'waits' did not score 8 completions within 0.3 s. Fix"),
        ("blocks", "reward 'blocks' did not score 8 completions within 0.3 s ("),
        ("leaves", "reward 'leaves' raised SystemExit: 0 ("),
    ],
)
def test_a_run_whose_reward_does_not_answer_ends_with_one_line(name, message, home, tmp_path, capsys):
    logging.disable_progress_bar()
    reward = ("--reward", f"{home / 'rewards.py'}:{name}", "--reward_timeout", "0.3")
    assert main(["train", "--config", str(home / "run.yaml"), *reward, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
