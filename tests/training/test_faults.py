"""Scorers that fail: they hang, raise, answer nonsense, or their server dies; and nothing is paid for twice."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.server import Server
from helpers.tiny import make_home, tiny_tokenizer
from transformers.utils import logging

from quarkrl.cli.main import main
from quarkrl.errors import UserError
from quarkrl.rewards import Perspective, Scorer
from quarkrl.rewards import scorer as scorer_module
from quarkrl.rewards.functions import endpoint as http

PROMPTS, TEXTS, IDS = ["p"] * 3, ["a", "bb", ""], [[1], [2, 2], [3]]
# Words that the server makes scores of; byte-level text would be mostly blank or broken.
WORDS = [*map(str, range(10, 60))]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    logging.disable_progress_bar()
    monkeypatch.setattr(http, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(scorer_module, "_GRACE", 0.2)
    monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(scorer: Scorer, texts=TEXTS):
    return scorer(["p"] * len(texts), list(texts), [[1]] * len(texts)).rewards[:, 0].tolist()


def length(completions):
    return [len(text) for text in completions]


# What hangs


def test_a_plain_function_that_hangs_is_left_and_named_with_its_line():
    released = threading.Event()

    def hangs(completions):
        released.wait(60)
        return length(completions)

    scorer = Scorer([length, hangs], timeout=0.2)
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        ask(scorer)
    line = hangs.__code__.co_firstlineno + 1
    assert str(error.value) == (
        f"reward 'hangs' did not score 3 completions within 0.2 s ({__file__}:{line}): "
        "mend it, or raise --reward_timeout; then resume the run"
    )
    with pytest.raises(UserError, match="reward 'hangs' still hangs: start a new process"):
        ask(scorer)
    assert time.monotonic() - began < 10
    released.set()


def test_an_async_function_that_hangs_is_cancelled_and_may_be_asked_again():
    cancelled, waits = [], [60, 0]

    async def slow(completions):
        try:
            await asyncio.sleep(waits.pop(0))
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return length(completions)

    scorer = Scorer([slow, length], timeout=0.2)
    with pytest.raises(UserError, match=r"reward 'slow' did not score 3 completions within 0\.2 s: mend it"):
        ask(scorer)
    assert cancelled == [True]
    assert ask(scorer) == [2, 4, 0]


def test_an_async_function_that_blocks_or_will_not_be_cancelled_is_left_all_the_same():
    released = threading.Event()

    async def blocks(completions):
        released.wait(60)

    async def stubborn(completions):
        while not released.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    for reward in (blocks, stubborn):
        scorer = Scorer(reward, timeout=0.1)
        with pytest.raises(UserError, match=f"reward '{reward.__name__}' did not score 3 completions"):
            ask(scorer)
    released.set()


def test_what_hangs_does_not_go_on_asking_once_it_has_come_back(tmp_path):
    """Of three parts of 256 texts the first hangs; the other two are never asked for."""
    released, asked = threading.Event(), []

    class Paid:
        name = "paid"

        def __init__(self):
            self.identity = {"name": "paid"}

        def __call__(self, completions):
            asked.append(len(completions))
            released.wait(60)
            return length(completions)

    scorer = Scorer(Paid(), cache=tmp_path / "c", timeout=0.1)
    with pytest.raises(UserError, match="reward 'paid' did not score 600 completions"):
        ask(scorer, [str(n) for n in range(600)])
    released.set()
    for thread in threading.enumerate():
        if thread.name == "reward":
            thread.join(10)
    assert asked == [256]


def test_in_time_all_is_as_without_a_limit():
    async def later(completions):
        await asyncio.sleep(0.01)
        return length(completions)

    def fails(completions):
        raise KeyError("no such")

    for limit in (None, 60, float("inf")):
        assert ask(Scorer([later, length], timeout=limit)) == [2, 4, 0]
        with pytest.raises(UserError, match=r"reward 'fails' raised KeyError: 'no such' \(.*test_faults.py:\d+\)"):
            ask(Scorer(fails, timeout=limit))
    for limit in (0, -1, float("nan")):
        with pytest.raises(UserError, match=r"reward_timeout .*: want more than 0 seconds"):
            Scorer(length, timeout=limit)


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
        tmp_path_factory.mktemp("faults"),
        tiny_tokenizer(words=WORDS),
        [f"{a} {b}" for a, b in pairwise(WORDS)],
        HANGING,
        steps_per_iteration=2,
        prompts_per_iteration=24,
        generation_batch_size=8,
        max_completion_length=3,
    )


def process(home: Path, *arguments: str | Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "quarkrl.cli", "train", "--config", home / "run.yaml", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_whose_reward_hangs_ends_with_one_line(home, tmp_path):
    reward = f"{home / 'rewards.py'}:sleeps"
    run = process(home, "--reward", reward, "--reward_timeout", "0.3", "--output_dir", tmp_path / "run")
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: reward 'sleeps' did not score 8 completions within 0.3 s (")
    assert line.endswith("rewards.py:5): mend it, or raise --reward_timeout; then resume the run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("waits", "reward 'waits' did not score 8 completions within 0.3 s: mend it"),
        ("blocks", "reward 'blocks' did not score 8 completions within 0.3 s ("),
        ("leaves", "reward 'leaves' raised SystemExit: 0 ("),
    ],
)
def test_a_run_whose_reward_does_not_answer_ends_with_one_line(name, message, home, tmp_path, capsys):
    reward = ("--reward", f"{home / 'rewards.py'}:{name}", "--reward_timeout", "0.3")
    assert main(["train", "--config", str(home / "run.yaml"), *reward, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


# What is no number


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -float("inf"), None])
def test_what_is_no_number_is_missing(value):
    rewards = Scorer(lambda completions: [1.0, value, 2])(PROMPTS, TEXTS, IDS).rewards[:, 0]
    assert rewards[[0, 2]].tolist() == [1.0, 2.0] and rewards[1] != rewards[1]


@pytest.mark.parametrize("value", ["1.0", b"1", [1.0], 1j, {}, object()])
def test_what_cannot_be_a_number_is_an_error(value):
    with pytest.raises(UserError, match="at index 1: a number or None is wanted"):
        ask(Scorer(lambda completions: [1.0, value, 2]))


HOSTILE = {
    "a whole number of 5,000 digits": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": 1%s}}}}'
    % (b"0" * 5000),
    "keys given twice": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.5, "value": 7}}}}',
    "deep objects": b'{"attributeScores":' * 50_000,
    "half a character": b'{"attributeScores": "\\ud800"}',
    "null": b"null",
    "little that unpacks to much": (200, gzip.compress(b" " * (64 << 20)), {"Content-Encoding": "gzip"}),
    "no gzip": (200, b"{}", {"Content-Encoding": "gzip"}),
    "a key that is no text": b"{1: 2}",
    "minus zero below": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": -1e-9}}}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_survived(name, server):
    server.plan("text 7", HOSTILE[name])
    reward = Perspective(endpoint=server.perspective, queries_per_second=None, give_up_after=20)
    assert ask(Scorer(reward), ["text 7"]) == [pytest.approx(0.93)]
    assert server.count == {"text 7": 2}


# A server that dies, a process that is killed


def test_a_server_that_dies_in_the_middle_and_comes_back_is_asked_for_the_rest(tmp_path):
    first = Server().start()
    port, url = first.port, first.perspective
    texts = [f"text {n}" for n in range(10, 40)]
    for text in texts[10:]:
        first.plan(text, *["reset"] * 50)  # it is going down
    down, done, counts = threading.Event(), threading.Event(), []

    def die_and_revive():
        while sum(first.count.values()) < 15:
            time.sleep(0.01)
        first.stop()
        down.set()
        time.sleep(0.4)  # nobody listens
        with Server(port) as revived:
            done.wait(20)
        counts.append(revived.count)

    other = threading.Thread(target=die_and_revive)
    other.start()
    reward = Perspective(endpoint=url, queries_per_second=None, concurrency=4, timeout=2, give_up_after=30)
    try:
        scores = ask(Scorer(reward, cache=tmp_path / "c", timeout=60), texts)
    finally:
        done.set()
        other.join()
    assert down.is_set()
    assert scores == [pytest.approx(1 - n / 100) for n in range(10, 40)]
    assert [first.count[text] for text in texts[:10]] == [1] * 10
    assert counts[0] == dict.fromkeys(texts[10:], 1)  # what had been answered is not asked for again


def test_each_score_is_kept_as_soon_as_it_is_there(tmp_path, server):
    """Of one call's twelve texts the last is refused for good, long before 256: the eleven before it are paid."""
    texts = [f"text {n}" for n in range(12)]
    server.plan("text 11", (403, {"error": {"message": "no more"}}))

    def scorer():
        reward = Perspective(endpoint=server.perspective, queries_per_second=None, concurrency=1)
        return Scorer(reward, cache=tmp_path / "c")

    with pytest.raises(UserError, match="no more"):
        ask(scorer(), texts)
    again = scorer()
    assert ask(again, texts) == [pytest.approx(1 - n / 100) for n in range(12)]
    assert (again.cache_misses, again.cache_hits) == (1, 11)
    assert server.count == {**dict.fromkeys(texts, 1), "text 11": 2}


def test_a_killed_run_that_goes_on_asks_for_no_text_again(home, tmp_path, server):
    """Killed while it scores; the server counts. What it had not answered, at most as many as are asked at once, is."""
    server.delay = 0.05
    reward = f"perspective?endpoint={server.perspective}&queries_per_second=none&concurrency=2"
    options = ("--reward", reward, "--score_cache", tmp_path / "cache.sqlite", "--output_dir", tmp_path / "run")
    run = process(home, *options)
    while sum(server.count.values()) < 13:
        time.sleep(0.01)
        assert run.poll() is None, run.communicate()
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    before = dict(server.count)
    server.delay = 0.0
    assert main(["train", "--config", str(home / "run.yaml"), *map(str, options), "--resume"]) == 0
    twice = [text for text, count in server.count.items() if count > 1]
    assert len(before) >= 12 and len(server.count) > len(before)
    assert len(twice) <= 2 and all(server.count[text] == 2 and text in before for text in twice)
