"""The score cache: nothing is asked for twice, whoever asks, and a file that is not ours is left alone."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from quarkrl.cli.main import main
from quarkrl.errors import UserError
from quarkrl.rewards import ScoreCache, Scorer, scorer
from quarkrl.rewards.cache import digest

WHO = {"name": "length", "version": 1}
FORK = multiprocessing.get_context("fork")  # Cheap: torch is loaded already.


class Length:
    """Scores by length, and remembers every text it was asked about."""

    name = "length"
    reads = ("completions",)

    def __init__(self, version=1):
        self.identity = {"version": version}
        self.asked: list[str] = []

    def __call__(self, completions):
        self.asked += completions
        return [float(len(text)) for text in completions]


def ask(scorer: Scorer, *texts: str, prompts: list | None = None, columns: dict | None = None) -> list[float]:
    prompts = ["p"] * len(texts) if prompts is None else prompts
    return scorer(prompts, list(texts), [[i] for i in range(len(texts))], columns).rewards[:, 0].tolist()


def error_of(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The file


def test_a_digest_is_of_canonical_json():
    text = '{"a":["\\u00e9"],"b":1}'
    assert digest({"b": 1, "a": ["é"]}) == hashlib.sha256(text.encode()).digest()


def test_what_is_put_is_got_by_who_scored_and_what_was_read(tmp_path):
    cache = ScoreCache(tmp_path / "new" / "scores.sqlite")
    a, b, c, d = (digest(text) for text in "abcd")
    cache.put(WHO, {a: 0.1, b: None, c: -1e300})
    assert cache.get(WHO, [a, b, d]) == {a: 0.1, b: None}
    assert cache.get({**WHO, "version": 2}, [a, b]) == {}
    assert cache.get(dict(reversed(WHO.items())), [c]) == {c: -1e300}
    cache.put(WHO, {a: 0.9, d: 1 / 3})  # What is known stays.
    cache.close()
    again = ScoreCache(tmp_path / "new" / "scores.sqlite")
    assert again.get(WHO, [a, b, c, d]) == {a: 0.1, b: None, c: -1e300, d: 1 / 3}
    assert len(again) == 4


def test_more_are_got_than_a_query_has_room_for(tmp_path):
    cache = ScoreCache(tmp_path / "c")
    scores = {digest(i): float(i) for i in range(1201)}
    cache.put(WHO, scores)
    assert cache.get(WHO, scores) == scores


def test_a_file_tells_who_scored_when(tmp_path):
    before = int(time.time())
    ScoreCache(tmp_path / "c").put(WHO, {digest("a"): 0.5})
    plain = sqlite3.connect(tmp_path / "c")
    row = plain.execute("SELECT identity, score, date FROM scores JOIN scorers ON scorers.id = scorer").fetchone()
    assert row[:2] == ('{"name": "length", "version": 1}', 0.5) and before <= row[2] <= time.time()
    assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def other_database(path: Path, statement: str = "CREATE TABLE mine (a)") -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()


def used_cache(path: Path) -> bytes:
    cache = ScoreCache(path)
    cache.put(WHO, {digest(i): float(i) for i in range(3000)})
    cache.close()
    return path.read_bytes()


FOREIGN = {
    "text": lambda path: path.write_text("my diary\n"),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "another SQLite file": other_database,
    "an empty one with a name of its own": lambda path: other_database(path, "PRAGMA application_id = 7"),
    "cut in the middle": lambda path: path.write_bytes(used_cache(path)[:20_000]),
    "overwritten": lambda path: path.write_bytes(used_cache(path)[:8192] + b"\xa5" * 8192 + used_cache(path)[16384:]),
    "of a later version": lambda path: (ScoreCache(path).close(), other_database(path, "PRAGMA user_version = 2")),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_no_cache_or_damaged_is_refused_and_left_as_it_is(tmp_path, make):
    path = tmp_path / "file"
    make(path)
    before = path.read_bytes()
    message = error_of(lambda: ScoreCache(path))
    assert str(path) in message and "name another file" in message
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_empty_file_becomes_a_cache_and_a_directory_does_not(tmp_path):
    (tmp_path / "c").touch()
    assert len(ScoreCache(tmp_path / "c")) == 0
    assert "is a directory" in error_of(lambda: ScoreCache(tmp_path))
    assert "its folder cannot be made" in error_of(lambda: ScoreCache(tmp_path / "c" / "under"))


def test_a_file_that_another_process_holds_for_too_long_is_an_error(tmp_path):
    cache = ScoreCache(tmp_path / "c", timeout=0.1)
    holder = sqlite3.connect(tmp_path / "c", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert "cannot be used: database is locked" in error_of(lambda: cache.put(WHO, {digest("a"): 1.0}))
    holder.execute("COMMIT")
    cache.put(WHO, {digest("a"): 1.0})
    assert cache.get(WHO, [digest("a")]) == {digest("a"): 1.0}


def write_many(path, number, start, failures):
    try:
        start.wait()
        cache = ScoreCache(path)
        for batch in range(10):  # Half of each batch is every process's, half its own.
            digests = [digest([batch, i]) for i in range(10)] + [digest([number, batch, i]) for i in range(10)]
            cache.put(WHO, dict.fromkeys(digests, float(number)))
            assert len(cache.get(WHO, digests)) == 20
    except BaseException as error:  # noqa: BLE001 - what it was is told to the test.
        failures.put(repr(error))
    else:
        failures.put(None)


def test_processes_make_and_write_one_file_at_the_same_time(tmp_path):
    for path in (tmp_path / "a", tmp_path / "b"):
        start, failures = FORK.Event(), FORK.Queue()
        processes = [FORK.Process(target=write_many, args=(path, n, start, failures)) for n in range(4)]
        for process in processes:
            process.start()
        start.set()
        assert [failures.get(timeout=60) for _ in processes] == [None] * 4
        for process in processes:
            process.join()
        assert len(ScoreCache(path)) == 10 * 10 + 4 * 10 * 10


# The scorer


def test_only_missing_distinct_texts_are_asked_for(tmp_path):
    first, second = Length(), Length()
    scoring = Scorer(first, cache=tmp_path / "c")
    assert ask(scoring, "a", "bb", "a", "", "bb") == [1, 2, 1, 0, 2]
    assert first.asked == ["a", "bb", ""] and (scoring.cache_misses, scoring.cache_hits) == (3, 0)
    assert ask(scoring, "ccc", "bb") == [3, 2]
    assert first.asked == ["a", "bb", "", "ccc"] and (scoring.cache_misses, scoring.cache_hits) == (4, 1)
    again = Scorer(second, weights=[10], cache=tmp_path / "c")  # The weight is no part of who scored.
    assert ask(again, "bb", "", "bb") == [20, 0, 20]
    assert second.asked == [] and (again.cache_misses, again.cache_hits) == (0, 3)
    newer = Length(version=2)
    ask(Scorer(newer, cache=tmp_path / "c"), "bb")
    assert newer.asked == ["bb"]


def test_without_a_cache_every_text_is_asked_for():
    reward = Length()
    ask(Scorer(reward), "a", "a")
    assert reward.asked == ["a", "a"]


def test_a_score_is_found_by_what_the_function_reads(tmp_path):
    calls: list[list] = []

    def fit(prompts, completions, **_):
        calls.append(list(zip(prompts, completions, strict=True)))
        return [float(prompt == completion) for prompt, completion in calls[-1]]

    fit.identity = {"version": 1}
    scoring = Scorer(fit, cache=tmp_path / "c")
    chat = [{"role": "user", "content": "x"}]
    assert ask(scoring, "x", "x", "x", "x", prompts=["x", "y", "x", chat]) == [1, 0, 1, 0]
    assert calls == [[("x", "x"), ("y", "x"), (chat, "x")]]
    assert ask(scoring, "y", "x", prompts=["y", "y"]) == [1, 0]
    assert calls[1:] == [[("y", "y")]]


def test_a_function_that_takes_whatever_there_is_is_asked_again_where_any_of_it_differs(tmp_path):
    def on_topic(completions, **columns):
        return [float(topic) for topic in columns["topic"]]

    on_topic.identity = {"version": 1}
    scoring = Scorer(on_topic, cache=tmp_path / "c")
    assert ask(scoring, "x", columns={"topic": [1]}) == [1]
    assert ask(scoring, "x", columns={"topic": [2]}) == [2]
    assert ask(scoring, "x", columns={"topic": [1]}) == [1]
    assert (scoring.cache_misses, scoring.cache_hits) == (2, 1)
    message = error_of(lambda: ask(scoring, "x", columns={"topic": [1], "image": [object()]}))
    assert "cannot be cached by" in message and "`reads`" in message
    on_topic.reads = ("completions", "theme")
    assert "reads 'theme'; there are topic, prompts" in error_of(lambda: ask(scoring, "x", columns={"topic": [1]}))


def test_what_is_cached_is_decided_for_each_reward(tmp_path):
    """A function of which nobody knows whether it will score alike tomorrow is always asked."""
    kept, called = Length(), []

    def anonymous(completions):
        called.extend(completions)
        return [1.0] * len(completions)

    scoring = Scorer([kept, anonymous], cache=tmp_path / "c")
    assert ask(scoring, "a", "a", "bb") == [2, 2, 3]
    assert ask(scoring, "bb") == [3]
    assert kept.asked == ["a", "bb"] and called == ["a", "a", "bb", "bb"]
    for reward in (anonymous, "repetition"):
        message = error_of(lambda reward=reward: Scorer(reward, cache=tmp_path / "c"))
        assert "leave score_cache out" in message
    anonymous.identity = {"version": 3}
    scoring = Scorer(anonymous, cache=tmp_path / "c")
    ask(scoring, "a"), ask(scoring, "a")
    assert called[4:] == ["a"]


def test_none_is_kept_and_nan_is_asked_again(tmp_path):
    answers = {"never": None, "not now": math.nan, "big": math.inf}

    class Unsure(Length):
        def __call__(self, completions):
            super().__call__(completions)
            return [answers.get(text, 1.0) for text in completions]

    reward = Unsure()
    for _ in range(2):
        found = ask(Scorer(reward, cache=tmp_path / "c"), "never", "not now", "big", "x")
        assert [math.isnan(value) for value in found] == [True, True, True, False]
    assert reward.asked == ["never", "not now", "big", "x", "not now", "big"]


def test_answers_before_an_error_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(scorer, "_COMMIT_EVERY", 2)

    class Quota(Length):
        left = 4

        def __call__(self, completions):
            if len(self.asked) + len(completions) > self.left:
                raise RuntimeError("quota")
            return super().__call__(completions)

    class AsyncQuota(Quota):
        name = "async"

        async def __call__(self, completions):
            await asyncio.sleep(0.01)
            return Quota.__call__(self, completions)

    for reward in (Quota(), AsyncQuota()):
        scoring = Scorer(reward, cache=tmp_path / "c")
        assert "raised RuntimeError: quota" in error_of(lambda scoring=scoring: ask(scoring, *"abcdefg"))
        assert reward.asked == ["a", "b", "c", "d"]
        reward.left = 99
        assert ask(scoring, *"abcdefg") == [1] * 7
        assert reward.asked == ["a", "b", "c", "d", "e", "f", "g"]


def test_async_rewards_are_cached_and_run_at_the_same_time(tmp_path):
    under_way = []

    class Slow(Length):
        async def __call__(self, completions):
            under_way.append(self)
            while len(under_way) < 2:  # one after the other, this would wait in vain
                await asyncio.sleep(0.01)
            return super().__call__(completions)

    first, second = Slow(), Slow(version=2)
    scoring = Scorer([first, second], cache=tmp_path / "c")
    assert ask(scoring, "a", "bb", "a") == [2, 4, 2]
    assert ask(scoring, "a", "bb") == [2, 4] and first.asked == second.asked == ["a", "bb"]
    assert (scoring.cache_misses, scoring.cache_hits) == (4, 4)


@pytest.mark.filterwarnings("error")
def test_an_async_reward_beside_a_broken_one_is_given_up_without_a_word(tmp_path):
    class Slow(Length):
        async def __call__(self, completions):
            raise AssertionError("begun")

    def broken(completions):
        raise ValueError("no")

    message = error_of(lambda: ask(Scorer([Slow(), broken], cache=tmp_path / "c"), "a"))
    gc.collect()  # Where Python would warn of a coroutine that was never awaited.
    assert "'broken' raised ValueError: no" in message


def score_until_killed(folder: Path) -> None:
    class Paid(Length):
        def __call__(self, completions):
            with open(folder / "bill", "a") as bill:
                bill.writelines(f"{text}\n" for text in completions)
            if "g" in completions:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(completions)

    scoring = Scorer(Paid(), cache=folder / "c")
    for batch in ("abc", "adef", "afgh", "ij"):
        ask(scoring, *batch)


def test_a_killed_process_loses_at_most_the_batch_in_flight(tmp_path):
    process = FORK.Process(target=score_until_killed, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "bill").read_text().split() == [*"abcdefgh"]
    reward = Length()
    assert ask(Scorer(reward, cache=tmp_path / "c"), *"abcdefghij") == [1] * 10
    assert reward.asked == [*"ghij"]  # Of what was paid before, only "g" and "h" were under way.


# The command


def test_score_says_how_many_came_from_the_cache(tmp_path, capsys):
    pytest.importorskip("vaderSentiment")
    (tmp_path / "texts.txt").write_text("good\nbad\ngood\n", encoding="utf-8")
    command = ["score", str(tmp_path / "texts.txt"), "--reward", "vader", "--score_cache", str(tmp_path / "c")]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "3 texts, 0 unscored, 0 from cache" in first.err
    assert main(command) == 0
    second = capsys.readouterr()
    assert second.out == first.out and "3 texts, 0 unscored, 3 from cache" in second.err
    assert main([*command[:-1], str(tmp_path / "texts.txt")]) == 2
    assert "is no score cache" in capsys.readouterr().err
    assert (tmp_path / "texts.txt").read_text() == "good\nbad\ngood\n"
