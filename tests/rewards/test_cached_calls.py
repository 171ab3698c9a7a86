"""Cached calls: each text is requested from a reward once, across batches, runs, errors and crashes."""

from __future__ import annotations

import asyncio
import gc
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.errors import error_message
from helpers.tiny_models import make_home, tiny_tokenizer

from quarkrl.cli.main import main
from quarkrl.rewards import Perspective, Scorer, cached_calls

FORK = multiprocessing.get_context("fork")  # Cheap: torch is loaded already.


class Length:
    """Scores by length, and records every text that it is asked to score."""

    name = "length"
    reads = ("completions",)

    def __init__(self, version=1):
        self.identity = {"version": version}
        self.requested: list[str] = []

    def __call__(self, completions):
        self.requested += completions
        return [float(len(text)) for text in completions]


def ask(scorer: Scorer, *texts: str, prompts: list | None = None, columns: dict | None = None) -> list[float]:
    """The reward of each text."""
    prompts = ["p"] * len(texts) if prompts is None else prompts
    return scorer(prompts, list(texts), [[i] for i in range(len(texts))], columns).rewards[:, 0].tolist()


def test_only_missing_distinct_texts_are_requested(tmp_path):
    first, second = Length(), Length()
    scoring = Scorer(first, cache=tmp_path / "c")
    assert ask(scoring, "a", "bb", "a", "", "bb") == [1, 2, 1, 0, 2]
    assert first.requested == ["a", "bb", ""] and (scoring.cache_misses, scoring.cache_hits) == (3, 0)
    assert ask(scoring, "ccc", "bb") == [3, 2]
    assert first.requested == ["a", "bb", "", "ccc"] and (scoring.cache_misses, scoring.cache_hits) == (4, 1)
    again = Scorer(second, weights=[10], cache=tmp_path / "c")  # The weight is not part of the identity.
    assert ask(again, "bb", "", "bb") == [20, 0, 20]
    assert second.requested == [] and (again.cache_misses, again.cache_hits) == (0, 3)
    newer = Length(version=2)
    ask(Scorer(newer, cache=tmp_path / "c"), "bb")
    assert newer.requested == ["bb"]


def test_without_a_cache_every_text_is_requested():
    reward = Length()
    ask(Scorer(reward), "a", "a")
    assert reward.requested == ["a", "a"]


def test_the_key_of_a_score_contains_every_argument_that_the_reward_reads(tmp_path):
    calls: list[list] = []

    def fit(prompts, completions, **_):
        calls.append(list(zip(prompts, completions, strict=True)))
        return [float(prompt == completion) for prompt, completion in calls[-1]]

    fit.identity = {"version": 1}
    fit.completions_as_text = True
    scoring = Scorer(fit, cache=tmp_path / "c")
    chat = [{"role": "user", "content": "x"}]
    assert ask(scoring, "x", "x", "x", "x", prompts=["x", "y", "x", chat]) == [1, 0, 1, 0]
    assert calls == [[("x", "x"), ("y", "x"), (chat, "x")]]
    assert ask(scoring, "y", "x", prompts=["y", "y"]) == [1, 0]
    assert calls[1:] == [[("y", "y")]]


def test_a_reward_that_accepts_all_columns_is_called_again_if_one_of_them_differs(tmp_path):
    def on_topic(completions, **columns):
        return [float(topic) for topic in columns["topic"]]

    on_topic.identity = {"version": 1}
    scoring = Scorer(on_topic, cache=tmp_path / "c")
    assert ask(scoring, "x", columns={"topic": [1]}) == [1]
    assert ask(scoring, "x", columns={"topic": [2]}) == [2]
    assert ask(scoring, "x", columns={"topic": [1]}) == [1]
    assert (scoring.cache_misses, scoring.cache_hits) == (2, 1)
    message = error_message(lambda: ask(scoring, "x", columns={"topic": [1], "image": [object()]}))
    assert "image" in message and "must be JSON-able to be cached" in message and "`reads`" in message
    on_topic.reads = ("completions", "theme")
    assert "reads 'theme': must be prompts, completions, completion_ids, or a column of the prompts" in error_message(
        lambda: ask(scoring, "x", columns={"topic": [1]})
    )


def test_each_reward_decides_whether_it_is_cached(tmp_path):
    """A function without an identity may score differently tomorrow, so it is always called."""
    kept, called = Length(), []

    def anonymous(completions):
        called.extend(completions)
        return [1.0] * len(completions)

    scoring = Scorer([kept, anonymous], cache=tmp_path / "c")
    assert ask(scoring, "a", "a", "bb") == [2, 2, 3]
    assert ask(scoring, "bb") == [3]
    assert kept.requested == ["a", "bb"] and called == ["a", "a", "bb", "bb"]
    for reward in (anonymous, "repetition"):
        message = error_message(lambda reward=reward: Scorer(reward, cache=tmp_path / "c"))
        assert "must be unset, because" in message and "cannot be cached" in message
    anonymous.identity = {"version": 3}
    scoring = Scorer(anonymous, cache=tmp_path / "c")
    ask(scoring, "a"), ask(scoring, "a")
    assert called[4:] == ["a"]


def test_none_is_cached_and_nan_is_retried(tmp_path):
    answers = {"never": None, "not now": math.nan, "big": math.inf}

    class Unsure(Length):
        def __call__(self, completions):
            super().__call__(completions)
            return [answers.get(text, 1.0) for text in completions]

    reward = Unsure()
    for _ in range(2):
        rewards = ask(Scorer(reward, cache=tmp_path / "c"), "never", "not now", "big", "x")
        assert [math.isnan(value) for value in rewards] == [True, True, True, False]
    assert reward.requested == ["never", "not now", "big", "x", "not now", "big"]


def test_answers_before_an_error_are_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(cached_calls, "COMMIT_EVERY", 2)

    class Quota(Length):
        limit = 4

        def __call__(self, completions):
            if len(self.requested) + len(completions) > self.limit:
                raise RuntimeError("quota")
            return super().__call__(completions)

    class AsyncQuota(Quota):
        name = "async"

        async def __call__(self, completions):
            await asyncio.sleep(0.01)
            return Quota.__call__(self, completions)

    for reward in (Quota(), AsyncQuota()):
        scoring = Scorer(reward, cache=tmp_path / "c")
        assert "raised RuntimeError: quota" in error_message(lambda scoring=scoring: ask(scoring, *"abcdefg"))
        assert reward.requested == ["a", "b", "c", "d"]
        reward.limit = 99
        assert ask(scoring, *"abcdefg") == [1] * 7
        assert reward.requested == ["a", "b", "c", "d", "e", "f", "g"]


def test_async_rewards_are_cached_and_run_concurrently(tmp_path):
    running = []

    class Slow(Length):
        async def __call__(self, completions):
            running.append(self)
            while len(running) < 2:  # If they ran one after another, the first would wait for ever.
                await asyncio.sleep(0.01)
            return super().__call__(completions)

    first, second = Slow(), Slow(version=2)
    scoring = Scorer([first, second], cache=tmp_path / "c")
    assert ask(scoring, "a", "bb", "a") == [2, 4, 2]
    assert ask(scoring, "a", "bb") == [2, 4] and first.requested == second.requested == ["a", "bb"]
    assert (scoring.cache_misses, scoring.cache_hits) == (4, 4)


@pytest.mark.filterwarnings("error")
def test_an_async_reward_that_never_starts_causes_no_warning(tmp_path):
    class Slow(Length):
        async def __call__(self, completions):
            raise AssertionError("started")

    def broken(completions):
        raise ValueError("no")

    message = error_message(lambda: ask(Scorer([Slow(), broken], cache=tmp_path / "c"), "a"))
    gc.collect()  # Python would warn of a coroutine that was never awaited here.
    assert "'broken' raised ValueError: no" in message


def score_until_killed(folder: Path) -> None:
    class Paid(Length):
        def __call__(self, completions):
            with open(folder / "bill", "a", encoding="utf-8") as bill:
                bill.writelines(f"{text}\n" for text in completions)
            if "g" in completions:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(completions)

    scoring = Scorer(Paid(), cache=folder / "c")
    for batch in ("abc", "adef", "afgh", "ij"):
        ask(scoring, *batch)


def test_a_killed_process_loses_at_most_the_request_in_progress(tmp_path):
    process = FORK.Process(target=score_until_killed, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "bill").read_text().split() == [*"abcdefgh"]
    reward = Length()
    assert ask(Scorer(reward, cache=tmp_path / "c"), *"abcdefghij") == [1] * 10
    assert reward.requested == [*"ghij"]  # Only "g" and "h" were in progress when the process died.


@pytest.mark.usefixtures("surroundings")
def test_each_score_of_an_endpoint_is_cached_immediately(tmp_path, server):
    """The last of twelve texts stops the run, long before 256 texts: the scores of the other eleven are stored."""
    texts = [f"text {n}" for n in range(12)]
    server.plan("text 11", (403, {"error": {"message": "no more"}}))

    def scorer():
        reward = Perspective(endpoint=server.perspective, queries_per_second=None, concurrency=1)
        return Scorer(reward, cache=tmp_path / "c")

    assert "no more" in error_message(lambda: ask(scorer(), *texts))
    again = scorer()
    assert ask(again, *texts) == [pytest.approx(1 - n / 100) for n in range(12)]
    assert (again.cache_misses, again.cache_hits) == (1, 11)
    assert server.count == {**dict.fromkeys(texts, 1), "text 11": 2}


WORDS = [*map(str, range(10, 60))]  # The server derives scores from the digits of a text.


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, prompts and the options of a short run."""
    return make_home(
        tmp_path_factory.mktemp("cached_calls"),
        tiny_tokenizer(words=WORDS),
        [f"{a} {b}" for a, b in pairwise(WORDS)],
        steps_per_iteration=2,
        prompts_per_iteration=24,
        generation_batch_size=8,
        max_completion_length=3,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("surroundings")
def test_a_killed_run_that_is_resumed_requests_no_text_again(home, tmp_path, server):
    """The server counts. Only the requests in progress, as many as `concurrency`, may be repeated."""
    server.delay = 0.05
    reward = f"perspective?endpoint={server.perspective}&queries_per_second=none&concurrency=2"
    options = ("--reward", reward, "--score_cache", tmp_path / "cache.sqlite", "--output_dir", tmp_path / "run")
    options += ("--samples_per_prompt", "1")  # Nothing depends on the rewards, so none is requested before the run.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "quarkrl.cli", "train", "--config", home / "run.yaml", *map(str, options)]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while sum(server.count.values()) < 13:
        time.sleep(0.01)
        assert run.poll() is None, run.communicate()
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=300)
    before = dict(server.count)
    server.delay = 0.0
    assert main(["train", "--config", str(home / "run.yaml"), *map(str, options), "--resume"]) == 0
    repeated = [text for text, count in server.count.items() if count > 1]
    assert len(before) >= 12 and len(server.count) > len(before)
    assert len(repeated) <= 2 and all(server.count[text] == 2 and text in before for text in repeated)
