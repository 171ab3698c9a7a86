"""The score cache's file: what it holds, who may share it, and that a foreign file is never modified."""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import sqlite3
import time
from pathlib import Path

import pytest
from helpers.errors import error_message

from quarkrl.cli.main import main
from quarkrl.rewards import ScoreCache
from quarkrl.rewards.cache import digest

WHO = {"name": "length", "version": 1}
FORK = multiprocessing.get_context("fork")  # Cheap: torch is loaded already.


def test_a_digest_is_of_canonical_json():
    text = '{"a":["\\u00e9"],"b":1}'
    assert digest({"b": 1, "a": ["é"]}) == hashlib.sha256(text.encode()).digest()


def test_a_score_is_found_by_identity_and_digest_and_is_never_replaced(tmp_path):
    cache = ScoreCache(tmp_path / "new" / "scores.sqlite")
    a, b, c, d = (digest(text) for text in "abcd")
    cache.put(WHO, {a: 0.1, b: None, c: -1e300})
    assert cache.get(WHO, [a, b, d]) == {a: 0.1, b: None}
    assert cache.get({**WHO, "version": 2}, [a, b]) == {}
    assert cache.get(dict(reversed(WHO.items())), [c]) == {c: -1e300}
    cache.put(WHO, {a: 0.9, d: 1 / 3})  # A known score stays.
    cache.close()
    again = ScoreCache(tmp_path / "new" / "scores.sqlite")
    assert again.get(WHO, [a, b, c, d]) == {a: 0.1, b: None, c: -1e300, d: 1 / 3}
    assert len(again) == 4


def test_a_request_may_exceed_the_parameters_of_one_query(tmp_path):
    cache = ScoreCache(tmp_path / "c")
    scores = {digest(i): float(i) for i in range(1201)}
    cache.put(WHO, scores)
    assert cache.get(WHO, scores) == scores


def test_the_file_holds_the_identity_and_the_date_of_each_score(tmp_path):
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
def test_a_foreign_or_damaged_file_is_refused_and_not_modified(tmp_path, make):
    path = tmp_path / "file"
    make(path)
    before = path.read_bytes()
    message = error_message(lambda: ScoreCache(path))
    assert f"score_cache {str(path)!r}: must be " in message and "name another file" in message
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_empty_file_becomes_a_cache_and_a_directory_does_not(tmp_path):
    (tmp_path / "c").touch()
    assert len(ScoreCache(tmp_path / "c")) == 0
    assert "must be a file, not a directory" in error_message(lambda: ScoreCache(tmp_path))
    assert "cannot create its folder" in error_message(lambda: ScoreCache(tmp_path / "c" / "under"))


def test_a_file_that_another_process_locks_for_too_long_is_an_error(tmp_path):
    cache = ScoreCache(tmp_path / "c", timeout=0.1)
    holder = sqlite3.connect(tmp_path / "c", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert "cannot use the file (database is locked)" in error_message(lambda: cache.put(WHO, {digest("a"): 1.0}))
    holder.execute("COMMIT")
    cache.put(WHO, {digest("a"): 1.0})
    assert cache.get(WHO, [digest("a")]) == {digest("a"): 1.0}


def write_many(path, number, start, failures):
    try:
        start.wait()
        cache = ScoreCache(path)
        for batch in range(10):  # Half of each batch is shared by all processes.
            digests = [digest([batch, i]) for i in range(10)] + [digest([number, batch, i]) for i in range(10)]
            cache.put(WHO, dict.fromkeys(digests, float(number)))
            assert len(cache.get(WHO, digests)) == 20
    except BaseException as error:  # noqa: BLE001 - the test reads it.
        failures.put(repr(error))
    else:
        failures.put(None)


def test_processes_create_and_write_one_file_concurrently(tmp_path):
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


def test_the_score_command_prints_the_number_of_cache_hits(tmp_path, capsys):
    pytest.importorskip("vaderSentiment")
    (tmp_path / "texts.txt").write_text("good\nbad\ngood\n", encoding="utf-8")
    command = [
        "score",
        str(tmp_path / "texts.txt"),
        "--reward",
        "vader",
        "--json",
        "--score_cache",
        str(tmp_path / "c"),
    ]
    assert main(command) == 0
    first = capsys.readouterr()
    assert re.match("3 texts, 0 .*, 0 from cache", first.err)
    assert main(command) == 0
    second = capsys.readouterr()
    assert second.out == first.out and re.match("3 texts, 0 .*, 3 from cache", second.err)
    assert main([*command[:-1], str(tmp_path / "texts.txt")]) == 2
    assert "must be an undamaged score cache" in capsys.readouterr().err
    assert (tmp_path / "texts.txt").read_text() == "good\nbad\ngood\n"
