"""Rewards over HTTP, against a real server on loopback that misbehaves on command."""

import asyncio
import itertools
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import traceback
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import numpy as np
import pytest
from helpers.scoring import KEY, ask, error_of, judge, perspective
from helpers.server import ANY, Server

from quarkrl.cli.main import main
from quarkrl.errors import UserError
from quarkrl.rewards import Judge, Perspective, Scorer
from quarkrl.rewards.functions import endpoint as http

pytestmark = pytest.mark.usefixtures("surroundings")


# Asking ---------------------------------------------------------------------------------------------------


def test_a_question_to_perspective_is_what_its_protocol_wants(server, monkeypatch):
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


def test_no_key_is_sent_where_none_is_set(server):
    ask(perspective(server), ["text 1"])
    ask(judge(server), ["text 1"])
    assert not {"x-goog-api-key", "authorization"} & {name.lower() for sent in server.headers for name in sent}


def test_order_is_kept_while_answers_come_in_another(server):
    texts = [f"text {i}" for i in range(40)]
    # Each third question has to be asked again, so that its answer comes after those of its successors.
    for text in texts[::3]:
        server.plan(text, "503")
    server.delay = 0.02
    assert ask(perspective(server, concurrency=8), texts) == pytest.approx([1 - i / 100 for i in range(40)])
    assert 2 <= server.most_at_once <= 8
    assert sum(server.count.values()) == 40 + 14


def test_concurrency_is_a_limit_and_is_used(server):
    server.delay = 0.3
    began = time.monotonic()
    ask(perspective(server, concurrency=20), [f"text {i}" for i in range(24)])
    assert time.monotonic() - began < 4  # one after the other: 7.2
    assert 10 <= server.most_at_once <= 20
    server.most_at_once, server.delay = 0, 0.02
    ask(perspective(server, concurrency=1), [f"text {i}" for i in range(4)])
    assert server.most_at_once == 1


def test_equal_texts_are_asked_for_once_and_blank_and_long_ones_never(server):
    longest = "é" * 10_240  # 20,480 bytes
    texts = ["text 3", "", "text 3", " \n\t", longest, longest + "a", "text 4"]
    assert ask(perspective(server), texts) == [0.97, None, 0.97, None, 1.0, None, 0.96]
    assert server.count == {"text 3": 1, longest: 1, "text 4": 1}
    assert ask(perspective(server), []) == []


def test_the_rate_is_kept_by_all_questions_repeated_ones_and_later_calls_included(server):
    reward = perspective(server, queries_per_second=25, concurrency=8)
    server.plan("text 2", "503", "500")
    asyncio.run(reward(completions=[f"text {i}" for i in range(12)]))
    asyncio.run(reward(completions=["text 50", "text 51"]))
    assert len(server.times) == 16
    # 15 gaps of 40 ms. What the network delays one question by, the next may come early by.
    span = server.times[-1] - server.times[0]
    assert 15 * 0.04 * 0.75 < span < 15 * 0.04 + 4
    assert min(later - sooner for sooner, later in itertools.pairwise(sorted(server.times)[::5])) > 5 * 0.04 * 0.5


# Faults ---------------------------------------------------------------------------------------------------

FAULTS = {
    "429": "429",
    "429 with Retry-After": "429 retry 0",
    "429 with nonsense in Retry-After": "429 retry soon",
    "408": "408",
    "500": "500",
    "503": "503",
    "reset in mid-body": "reset",
    "closed in mid-body": "truncated",
    "half a JSON": b'{"attributeScores": {"TOXI',
    "no JSON": b"<html>\x1b[31mBad gateway</html>",
    "no UTF-8": b'{"attributeScores": "\xff\xfe"}',
    "nothing": b"",
    "deep": b"[" * 100_000,
    "endless": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.5}}}}' + b" " * http.LARGEST_ANSWER,
    "NaN": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": NaN}}}}',
    "infinite": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": 1e999}}}}',
    "over one": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": 1.5}}}}',
    "a string": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": "0.5"}}}}',
    "a truth": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": true}}}}',
    "null": b'{"attributeScores": {"TOXICITY": {"summaryScore": null}}}',
    "another attribute": b'{"attributeScores": {"INSULT": {"summaryScore": {"value": 0.5}}}}',
    "a list": b'[{"attributeScores": 1}]',
    "a number": b"3",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_survived_by_asking_again(fault, server):
    server.plan("text 7", FAULTS[fault], FAULTS[fault])
    assert ask(perspective(server, concurrency=2), ["text 5", "text 7", "text 8"]) == [0.95, 0.93, 0.92]
    assert server.count == {"text 5": 1, "text 7": 3, "text 8": 1}


def test_a_server_that_hangs_is_left_after_the_timeout(server):
    server.plan("text 7", "hang")
    began = time.monotonic()
    assert ask(perspective(server, timeout=0.3), ["text 7", "text 8"]) == [0.93, 0.92]
    assert 0.3 <= time.monotonic() - began < 5
    assert server.count["text 7"] == 2


def test_an_answer_that_drips_is_left_after_the_timeout_too(server, monkeypatch):
    """Each byte comes in time; the whole does not."""
    answer = json.dumps({"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.5}}}}).encode()

    def drip(handler, body, reset):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        for byte in answer:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.1)

    monkeypatch.setattr("helpers.server.Handler.break_off", drip)
    server.plan("text 7", "truncated")
    began = time.monotonic()
    assert ask(perspective(server, timeout=0.4), ["text 7"]) == [0.93]
    assert time.monotonic() - began < 4  # in all it would take some 7


def test_a_server_that_is_dead_for_a_while(server):
    dead = Server()
    port, url = dead.port, dead.perspective
    dead.server_close()  # from now on connections are refused

    def revive():
        with Server(port) as revived:
            done.wait(10)
        counts.append(dict(revived.count))

    done, counts = threading.Event(), []
    timer = threading.Timer(0.3, revive)
    timer.start()
    try:
        began = time.monotonic()
        reward = Perspective(endpoint=url, queries_per_second=None, give_up_after=20)
        assert ask(reward, ["text 1", "text 2"]) == [0.99, 0.98]
        assert 0.25 < time.monotonic() - began < 10
    finally:
        done.set()
        timer.join()
    assert counts == [{"text 1": 1, "text 2": 1}]


def test_the_back_off_grows_and_is_spread(server, monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.06)
    server.plan("text 7", "503", "503", "503", "503")
    ask(perspective(server), ["text 7"])
    waits = np.diff(server.times)
    full = np.array([0.06, 0.12, 0.24, 0.48])  # doubled each time, of which a half to the whole is waited
    assert (waits >= full / 2 - 0.01).all() and (waits <= full + 0.5).all()


def test_retry_after_holds_back_all_questions(server):
    server.plan("text 0", "429 retry 0.6")
    server.delay = 0.03
    ask(perspective(server, concurrency=2), [f"text {i}" for i in range(8)])
    gaps = np.diff(sorted(server.times))
    # Were only "text 0" held back, all others would have been asked for before the gap.
    assert 0.55 < gaps.max() < 4 and len(gaps) - gaps.argmax() >= 4


def test_retry_after_is_capped(server, monkeypatch):
    monkeypatch.setattr(http, "LONGEST_WAIT", 0.2)
    server.plan("text 7", "429 retry 86400")
    began = time.monotonic()
    assert ask(perspective(server), ["text 7"]) == [0.93]
    assert 0.2 <= time.monotonic() - began < 5


def test_retry_after_in_seconds_and_as_a_date():
    in_a_minute = format_datetime(datetime.now(timezone.utc) + timedelta(minutes=1), usegmt=True)
    assert 57 < http._seconds(in_a_minute) <= 60
    assert http._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert (http._seconds(" 120 "), http._seconds("1.5"), http._seconds("0")) == (120, 1.5, 0)
    for nonsense in (None, "", "soon", "-5", "nan", "inf", "²"):
        assert http._seconds(nonsense) is None


# The last word --------------------------------------------------------------------------------------------


def refusal(kind, message="no"):
    details = [{"@type": "type.googleapis.com/google.commentanalyzer.v1alpha1.Error", "errorType": kind}]
    return 400, {"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT", "details": details}}


@pytest.mark.parametrize(
    "kind",
    ["COMMENT_EMPTY", "COMMENT_TOO_LONG", "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE", "LANGUAGE_DETECTION_FAILED"],
)
def test_a_final_refusal_gives_none_and_is_not_asked_again(kind, server):
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
    message = error_of(lambda: ask(perspective(server, concurrency=4), texts))
    assert message.startswith(f"reward 'perspective-toxicity': {server.perspective} refuses: HTTP {answer[0]}")
    assert message.isprintable() and len(message) < 600
    assert max(server.count.values()) == 1 and len(server.count) <= 4  # no text is asked for again, nor many more


def test_giving_up_is_one_line_that_says_who_and_what(server):
    server.plan(ANY, *[(503, b"<h1>\nover\x1b[31mloaded</h1>" + b"x" * 5000)] * 1000)
    scorer = Scorer(perspective(server, give_up_after=0.5))
    began = time.monotonic()
    message = error_of(lambda: scorer(["p"] * 9, [f"text {i}" for i in range(9)], [[]] * 9))
    assert time.monotonic() - began < 5
    pattern = r"gave no usable answer in [0-9] s and [0-9]+ tries, the last: HTTP 503 <h1> over \[31mloaded</h1>x+"
    assert re.search(pattern, message) and server.perspective in message and "resume the run" in message
    assert len(message) < 600
    asked = len(server.times)
    time.sleep(0.3)
    assert len(server.times) == asked  # nothing goes on behind the user's back


def test_an_error_stops_the_other_questions_at_once(server):
    server.plan("text 0", (403, {"error": "not you"}))
    server.delay = 0.03
    assert "HTTP 403" in error_of(lambda: ask(perspective(server, concurrency=2), [f"text {i}" for i in range(200)]))
    assert len(server.times) < 50


@pytest.mark.parametrize("turns", range(1, 12))
def test_an_error_stops_a_question_whose_answer_comes_with_it(server, monkeypatch, turns):
    # The answer comes so many turns of the event loop after the refusal: at one of them asyncio.wait_for of
    # Python 3.10 and 3.11 drops the cancellation, and that worker would ask on alone.
    asked, refused = [], asyncio.Event()

    async def post(endpoint, client, content):
        asked.append(content)
        if len(asked) == 1:
            await asyncio.sleep(0)  # until the other question is under way
            refused.set()
            return 403, None, b"{}"
        await refused.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        return 200, None, json.dumps({"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.5}}}}).encode()

    monkeypatch.setattr(http.Endpoint, "_post", post)
    assert "HTTP 403" in error_of(lambda: ask(perspective(server, concurrency=2), [f"text {i}" for i in range(200)]))
    assert len(asked) <= 10


def test_giving_up_where_nobody_listens():
    with Server() as gone:
        reward = Perspective(endpoint=gone.perspective, queries_per_second=None, give_up_after=0.2)
    message = error_of(lambda: ask(reward, ["text 1"]))
    assert gone.perspective in message and "ConnectError" in message


def test_waiting_for_ones_turn_is_not_asking_in_vain(server):
    # 8 texts at 10 a second take 0.7 s, longer than give_up_after.
    reward = perspective(server, queries_per_second=10, give_up_after=0.4)
    server.plan("text 7", "503")
    assert ask(reward, [f"text {i}" for i in range(8)]) == pytest.approx([1 - i / 100 for i in range(8)])


def test_a_long_wait_is_told_once(server, caplog, monkeypatch):
    monkeypatch.setattr(http, "TOLD_FROM", 0.2)
    server.plan("text 7", "503", "503 retry 0.2", "503 retry 0.3")
    with caplog.at_level(logging.WARNING):
        assert ask(perspective(server, give_up_after=5), ["text 7"]) == [0.93]
    (record,) = [record for record in caplog.records if record.name == "quarkrl.rewards.functions.endpoint"]
    assert "HTTP 503" in record.getMessage() and "asking again for up to 5 s" in record.getMessage()


# The key --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [perspective, judge])
def test_the_key_is_nowhere_but_in_the_header(make, server, monkeypatch, caplog):
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    reward = make(server, give_up_after=0.1)
    assert ask(reward, ["text 1"])[0] is not None
    assert KEY in str(server.headers)  # or this would prove nothing
    echo = json.dumps({"error": f"what is {KEY}?"}).encode()
    texts = [str(server.bodies), repr(reward), repr(vars(reward)), repr(vars(reward._endpoint))]
    texts += [json.dumps(Scorer(reward).identity), reward.name, str(pickle.dumps(reward.identity))]
    errors = []
    for fault in ((403, echo), (503, echo), (503, b"x" * 260 + echo), b"x" * 260 + echo, echo, "reset"):
        server.faults[ANY].clear()
        server.plan(ANY, *[fault] * 100)
        with pytest.raises(UserError) as caught:
            ask(reward, ["text 2"])
        errors.append(str(caught.value))
        texts += [repr(caught.value), "".join(traceback.format_exception(caught.value))]
    assert "what is ***?" in errors[0] and "what is ***?" in errors[1]
    assert not any(KEY[:4] in error for error in errors)  # nor a part of it, where a message is cut
    texts += [*errors, caplog.text, *(str(record.args) for record in caplog.records)]
    assert "HTTP Request" in caplog.text  # the client's own log was on
    assert KEY not in "".join(texts)


def test_a_key_that_no_header_takes_is_an_error_that_does_not_show_it(server, monkeypatch):
    for key in ("sécret", "two\nlines", "a b"):
        monkeypatch.setenv("PERSPECTIVE_API_KEY", key)
        message = error_of(lambda: ask(perspective(server), ["text 1"]))
        assert "PERSPECTIVE_API_KEY holds no key" in message and key not in message
    monkeypatch.setenv("PERSPECTIVE_API_KEY", f"  {KEY}\n")  # as `cat` gives it
    assert ask(perspective(server), ["text 1"]) == [0.99]


def test_a_key_is_wanted_by_the_original_service_only(server, monkeypatch):
    message = error_of(Perspective)
    assert "PERSPECTIVE_API_KEY is not set" in message and "31 December 2026" in message
    perspective(server)
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    endpoint = Perspective().identity["endpoint"]
    assert endpoint == "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"


@pytest.mark.parametrize(
    "endpoint",
    [f"https://host/path?key={KEY}", f"https://user:{KEY}@host/path", f"https://host/#{KEY}", f"ftp://host/{KEY}"],
)
def test_a_key_in_the_endpoint_is_refused_and_not_shown(endpoint):
    for action in (lambda: Perspective(endpoint=endpoint), lambda: Judge(endpoint, "m", "r")):
        message = error_of(action)
        assert KEY not in message and ("API_KEY" in message or "is no address" in message)


# In use ---------------------------------------------------------------------------------------------------


def test_both_work_through_a_scorer_call_after_call_and_in_a_notebook(server):
    quick = "queries_per_second=none"
    scorer = Scorer(
        [f"perspective?endpoint={server.perspective}&{quick}", judge(server, scale="0-100")], weights=[1.0, 2.0]
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


def test_identity_says_who_scored_and_unwanted_what_is_measured(server):
    reward = perspective(server, attribute="threat")
    assert reward.identity == {
        "name": "perspective-threat",
        "endpoint": server.perspective,
        "attribute": "THREAT",
        "languages": ["en"],
    }
    assert Scorer(reward).unwanted == "threat" and Scorer(perspective(server)).unwanted == "toxicity"


def test_score_as_a_process(server, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("text 5\ntext 90\n", encoding="utf-8")
    server.plan("text 90", "503", refusal("COMMENT_TOO_LONG"))
    spec = f"perspective?endpoint={server.perspective}&queries_per_second=100&attribute=insult"
    done = subprocess.run(
        [sys.executable, "-m", "quarkrl.cli", "score", tmp_path / "texts.txt", "--reward", spec],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PERSPECTIVE_API_KEY": KEY},
    )
    assert (done.returncode, done.stdout) == (0, "0.9500\ttext 5\n-\ttext 90\n"), done.stderr
    assert "2 texts, 1 unscored" in done.stderr and KEY not in done.stderr
    assert server.count == {"text 5": 1, "text 90": 2}

    server.plan(ANY, *[(403, {"error": f"{KEY} is blocked"})] * 2)
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    assert main(["score", str(tmp_path / "texts.txt"), "--reward", spec]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: reward 'perspective-insult': http://127.0.0.1:")
    assert "*** is blocked" in line and KEY not in line
