"""`Perspective`: its protocol, against a real server on loopback."""

import asyncio
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.errors import error_message
from helpers.reward_helpers import KEY, ask, judge, perspective
from helpers.server import ANY

from quarkrl.cli.main import main
from quarkrl.rewards import Perspective, Scorer

pytestmark = pytest.mark.usefixtures("surroundings")


def test_a_request_follows_the_protocol(server, monkeypatch):
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    reward = perspective(server, attribute="insult", languages=["en", "de"])
    assert ask(reward, ["text 25"]) == [0.75]  # 1 - 0.25
    assert server.bodies == [
        {
            "comment": {"text": "text 25"},
            "languages": ["en", "de"],
            "requestedAttributes": {"INSULT": {}},
            "doNotStore": True,
        }
    ]
    assert {name.lower(): value for name, value in server.headers[0].items()}["x-goog-api-key"] == KEY


def test_equal_texts_are_sent_once_and_blank_and_long_ones_never(server):
    longest = "é" * 10_240  # 20,480 bytes.
    texts = ["text 3", "", "text 3", " \n\t", longest, longest + "a", "text 4"]
    assert ask(perspective(server), texts) == [0.97, None, 0.97, None, 1.0, None, 0.96]
    assert server.count == {"text 3": 1, longest: 1, "text 4": 1}
    assert ask(perspective(server), []) == []


def answer(value: bytes) -> bytes:
    return b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": %s}}}}' % value


UNUSABLE = {
    "NaN": answer(b"NaN"),
    "infinite": answer(b"1e999"),
    "over one": answer(b"1.5"),
    "a string": answer(b'"0.5"'),
    "a boolean": answer(b"true"),
    "null": b'{"attributeScores": {"TOXICITY": {"summaryScore": null}}}',
    "another attribute": b'{"attributeScores": {"INSULT": {"summaryScore": {"value": 0.5}}}}',
    "a list": b'[{"attributeScores": 1}]',
    "a number": b"3",
    "an integer of 5,000 digits": answer(b"1" + b"0" * 5000),
    "a repeated key": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.5, "value": 7}}}}',
    "nested objects": b'{"attributeScores":' * 50_000,
    "half a character": b'{"attributeScores": "\\ud800"}',
    "nothing but null": b"null",
    "a small body that unpacks to 64 MB": (200, gzip.compress(b" " * (64 << 20)), {"Content-Encoding": "gzip"}),
    "no gzip": (200, b"{}", {"Content-Encoding": "gzip"}),
    "a key that is not a string": b"{1: 2}",
    "below zero": answer(b"-1e-9"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_hostile_or_unusable_answer_is_retried(name, server):
    server.plan("text 7", UNUSABLE[name], UNUSABLE[name])
    reward = perspective(server, concurrency=2, give_up_after=60)
    assert ask(reward, ["text 5", "text 7", "text 8"]) == [0.95, 0.93, 0.92]
    assert server.count == {"text 5": 1, "text 7": 3, "text 8": 1}


def refusal(kind, message="no"):
    details = [{"@type": "type.googleapis.com/google.commentanalyzer.v1alpha1.Error", "errorType": kind}]
    return 400, {"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT", "details": details}}


@pytest.mark.parametrize(
    "kind",
    ["COMMENT_EMPTY", "COMMENT_TOO_LONG", "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE", "LANGUAGE_DETECTION_FAILED"],
)
def test_a_refusal_of_the_text_gives_none_and_is_not_retried(kind, server):
    server.plan("text 7", refusal(kind))
    assert ask(perspective(server), ["text 6", "text 7", "text 8"]) == [0.94, None, 0.92]
    assert server.count == {"text 6": 1, "text 7": 1, "text 8": 1}


@pytest.mark.parametrize(
    "answer",
    [
        (400, {"error": {"code": 400, "message": "API key not valid.", "details": [{"reason": "API_KEY_INVALID"}]}}),
        refusal("NO_REQUESTED_ATTRIBUTES"),
        refusal(["COMMENT_EMPTY"]),
        (400, {"error": {"details": "COMMENT_EMPTY"}}),
        (400, b"\x00no\r\nJSON"),
        (401, {"error": "who are you?"}),
        (403, {"error": "not you"}),
        (404, b"no such page"),
        (302, b""),
    ],
)
def test_any_other_refusal_stops_the_run_at_once(answer, server):
    server.plan(ANY, *[answer] * 200)
    texts = [f"text {i}" for i in range(100)]
    message = error_message(lambda: ask(perspective(server, concurrency=4), texts))
    assert message.startswith(f"reward 'perspective-toxicity': {server.perspective} refuses: HTTP {answer[0]}")
    assert message.isprintable() and len(message) < 600
    assert max(server.count.values()) == 1 and len(server.count) <= 4


def test_only_the_original_service_requires_a_key(server, monkeypatch):
    message = error_message(Perspective)
    assert "PERSPECTIVE_API_KEY: must be set" in message and "31 December 2026" in message
    perspective(server)
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    endpoint = Perspective().identity["endpoint"]
    assert endpoint == "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"


def test_two_endpoints_work_in_one_scorer_batch_after_batch_and_in_a_notebook(server):
    unlimited = "queries_per_second=none"
    scorer = Scorer(
        [f"perspective?endpoint={server.perspective}&{unlimited}", judge(server, scale="0-100")], weights=[1.0, 2.0]
    )
    texts = ["text 10", "", "text 30"]
    for _ in range(2):
        scores = scorer(["p"] * 3, texts, [[]] * 3)
        np.testing.assert_allclose(scores.components, [[0.9, 0.1], [np.nan, 0], [0.7, 0.3]])
        np.testing.assert_allclose(scores.rewards[:, 0], [1.1, np.nan, 1.3])
    assert scorer.names == ("perspective-toxicity", "judge-judge-7b")

    async def notebook():
        return scorer(["p"] * 3, texts, [[]] * 3)

    np.testing.assert_allclose(asyncio.run(notebook()).rewards[:, 0], [1.1, np.nan, 1.3])


def test_the_identity_contains_endpoint_attribute_and_languages(server):
    reward = perspective(server, attribute="threat")
    assert reward.identity == {
        "name": "perspective-threat",
        "endpoint": server.perspective,
        "attribute": "THREAT",
        "languages": ["en"],
    }
    assert Scorer(reward).unwanted == "threat" and Scorer(perspective(server)).unwanted == "toxicity"


def test_the_score_command_retries_and_never_prints_the_key(server, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("text 5\ntext 90\n", encoding="utf-8")
    server.plan("text 90", "503", refusal("COMMENT_TOO_LONG"))
    spec = f"perspective?endpoint={server.perspective}&queries_per_second=100&attribute=insult"
    done = subprocess.run(
        [sys.executable, "-m", "quarkrl.cli", "score", tmp_path / "texts.txt", "--reward", spec, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PERSPECTIVE_API_KEY": KEY},
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["reward"] for line in done.stdout.splitlines()] == [0.95, None]
    assert done.stderr.startswith("2 texts, 1 ") and KEY not in done.stderr
    assert server.count == {"text 5": 1, "text 90": 2}

    server.plan(ANY, *[(403, {"error": f"{KEY} is blocked"})] * 2)
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    assert main(["score", str(tmp_path / "texts.txt"), "--reward", spec]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: reward 'perspective-insult': http://127.0.0.1:")
    assert "*** is blocked" in line and KEY not in line
