"""`Endpoint`: concurrency, rate limit, retries, time budget and the key.

Waits are checked by a simulated clock and a transport without a network. Faults of a network are checked against a
real server on loopback that misbehaves on command.
"""

import asyncio
import json
import logging
import pickle
import re
import threading
import time
import traceback

import httpx2
import numpy as np
import pytest
from helpers.errors import error_message
from helpers.reward_helpers import KEY, ask, judge, perspective
from helpers.server import ANY, Server
from helpers.simulated_clock import SimulatedClock

from quarkrl.errors import UserError
from quarkrl.rewards import Judge, Perspective, Scorer
from quarkrl.rewards.functions import endpoint as endpoint_module
from quarkrl.rewards.functions.endpoint import ApiKey, Endpoint, Limits
from quarkrl.rewards.functions.rate_limiter import SystemClock

pytestmark = pytest.mark.usefixtures("surroundings")


class Service:
    """A service without a network: answers text n with the score n, unless a fault is planned.

    `requests` holds the time and text of each request. A fault is a status, or a status and a dict of headers. Each
    answer takes `seconds` of simulated time.
    """

    def __init__(self, faults=None, seconds=0.0):
        self.clock = SimulatedClock()
        self.faults = {text: list(planned) for text, planned in (faults or {}).items()}
        self.seconds = seconds
        self.requests = []
        self.concurrent = self.most_concurrent = 0

    async def answer(self, request):
        text = json.loads(request.content)
        self.requests.append((self.clock.now(), text))
        self.concurrent += 1
        self.most_concurrent = max(self.concurrent, self.most_concurrent)
        if self.seconds:
            await self.clock.sleep(self.seconds)
        self.concurrent -= 1
        planned = self.faults.get(text)
        fault = planned.pop(0) if planned else 200
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        return httpx2.Response(status, headers=headers, json={"score": text})

    def endpoint(self, *, concurrency=1, queries_per_second=None, timeout=60, give_up_after=600):
        return Endpoint(
            "unit",
            "http://host/score",
            read_score=lambda answer: answer["score"],
            is_final_refusal=lambda answer: answer["score"] == 13,
            key=ApiKey("UNIT_KEY", header="X-Key"),
            limits=Limits(concurrency, queries_per_second, timeout, give_up_after),
            clock=self.clock,
            transport=httpx2.MockTransport(self.answer),
        )

    def times(self, text=None):
        return [time for time, requested in self.requests if text in (None, requested)]


@pytest.fixture
def usual_waits(monkeypatch):
    """The waits of a run: 0.5 s, doubled with each attempt up to 60 s."""
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.5)


# Requests


def test_scores_keep_the_order_of_the_texts_while_answers_arrive_in_another(server):
    texts = [f"text {i}" for i in range(40)]
    for text in texts[::3]:  # The answers of the retries arrive after those of the following texts.
        server.plan(text, "503")
    server.delay = 0.02
    assert ask(perspective(server, concurrency=8), texts) == pytest.approx([1 - i / 100 for i in range(40)])
    assert 2 <= server.most_at_once <= 8
    assert sum(server.count.values()) == 40 + 14


@pytest.mark.parametrize(("concurrency", "seconds"), [(20, 2.0), (8, 3.0), (1, 24.0)])
def test_concurrency_is_a_limit_and_is_fully_used(concurrency, seconds):
    """24 texts of one second each."""
    service = Service(seconds=1.0)
    assert asyncio.run(service.endpoint(concurrency=concurrency).score(range(24))) == [*range(24)]
    assert service.most_concurrent == concurrency and service.clock.now() == pytest.approx(seconds)


def test_equal_bodies_are_sent_once_and_none_is_not_sent():
    service, reported = Service(), []
    endpoint = service.endpoint()
    scores = asyncio.run(endpoint.score([3, None, 3, 4], lambda row, score: reported.append((row, score))))
    assert scores == [3, None, 3, 4] and [text for _, text in service.requests] == [3, 4]
    assert reported == [(0, 3), (2, 3), (3, 4)]
    assert asyncio.run(endpoint.score([])) == []


def test_the_rate_limit_holds_for_retries_and_later_batches_too(usual_waits):
    service = Service({2: [503, 500]})
    endpoint = service.endpoint(queries_per_second=25, concurrency=8)
    asyncio.run(endpoint.score(range(12)))
    asyncio.run(endpoint.score([50, 51]))
    times = sorted(service.times())
    assert len(times) == 12 + 2 + 2
    assert np.diff(times).min() >= 0.04 - 1e-9
    assert times[:8] == pytest.approx([i / 25 for i in range(8)])  # And requests are not slower than the limit.


# Retries and waits


def test_waits_double_and_a_random_half_to_whole_of_each_is_used(usual_waits):
    service = Service({7: [503] * 5})
    assert asyncio.run(service.endpoint().score([7])) == [7]
    waits, full = np.diff(service.times()), np.array([0.5, 1, 2, 4, 8])
    assert (waits >= full / 2).all() and (waits <= full).all()
    assert len({*(waits / full)}) == 5


def test_waits_are_capped_at_a_minute(usual_waits):
    service = Service({7: [503] * 12})
    assert asyncio.run(service.endpoint(give_up_after=10_000).score([7])) == [7]
    waits = np.diff(service.times())
    assert waits.max() <= 60 and (waits[7:] >= 30).all()


def test_retry_after_holds_back_all_texts(usual_waits):
    """Both first answers arrive after 1 s; one of them demands a pause of 30 s."""
    service = Service({0: [(429, {"Retry-After": "30"})]}, seconds=1.0)
    assert asyncio.run(service.endpoint(concurrency=2).score(range(5))) == [*range(5)]
    assert service.times() == [0, 0, 31, 31, 32, 32]


def test_retry_after_is_capped_at_a_minute(usual_waits):
    service = Service({7: [(429, {"Retry-After": "86400"})]})
    assert asyncio.run(service.endpoint().score([7])) == [7]
    assert service.times() == [0, 60]


def test_an_error_after_the_time_budget_names_the_endpoint_and_the_last_answer(usual_waits):
    service = Service({7: [503] * 1000})
    with pytest.raises(UserError) as caught:
        asyncio.run(service.endpoint(give_up_after=600).score([7]))
    attempts, elapsed = len(service.requests), service.clock.now()
    assert 540 <= elapsed <= 600  # Another wait of up to 60 s would exceed the budget.
    expected = f"reward 'unit': http://host/score gave no usable answer in {elapsed:.0f} s and {attempts} requests"
    assert str(caught.value).startswith(f"{expected}, the last: HTTP 503 ")
    assert str(caught.value).endswith(". Fix the cause.")


def test_waiting_for_the_rate_limit_does_not_use_up_the_time_budget(usual_waits):
    """Eight texts wait together, the last for 1400 s, which is longer than `give_up_after`."""
    service = Service({7: [503]})
    endpoint = service.endpoint(queries_per_second=1 / 200, concurrency=8, give_up_after=600)
    assert asyncio.run(endpoint.score(range(8))) == [*range(8)]
    assert service.times(7) == pytest.approx([1400, 1600])


def test_a_long_wait_is_warned_of_once_until_the_endpoint_answers_again(usual_waits, caplog):
    pause = (503, {"Retry-After": "10"})
    service = Service({1: [503, pause, pause], 3: [pause]})
    with caplog.at_level(logging.WARNING):
        asyncio.run(service.endpoint().score([1, 2, 3]))
    messages = [r.getMessage() for r in caplog.records if r.name == "quarkrl.rewards.functions.endpoint"]
    assert len(messages) == 2
    assert all("HTTP 503" in message and "retrying for up to 600 s" in message for message in messages)


# Faults of the network, and of the service

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
    "endless": b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.5}}}}'
    + b" " * endpoint_module.MAX_ANSWER_BYTES,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_retried(fault, server):
    server.plan("text 7", FAULTS[fault], FAULTS[fault])
    assert ask(perspective(server, concurrency=2), ["text 5", "text 7", "text 8"]) == [0.95, 0.93, 0.92]
    assert server.count == {"text 5": 1, "text 7": 3, "text 8": 1}


def test_a_request_without_an_answer_is_retried_after_the_timeout(server):
    server.plan("text 7", "hang")
    assert ask(perspective(server, timeout=0.3), ["text 7", "text 8"]) == [0.93, 0.92]
    assert server.count == {"text 7": 2, "text 8": 1}


def test_the_timeout_is_for_the_whole_answer_not_for_each_byte(server, monkeypatch):
    """Each byte arrives in time; the whole answer, whose score is 0.5, would take seven seconds."""
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
    assert ask(perspective(server, timeout=0.4), ["text 7"]) == [0.93]
    assert server.count == {"text 7": 2}


class RevivingClock(SystemClock):
    """Starts a server when the endpoint waits before its first retry."""

    def __init__(self, port):
        self.port, self.server = port, None

    async def sleep(self, seconds):
        if self.server is None:
            self.server = Server(self.port).start()
        await super().sleep(0)


def test_a_server_that_is_down_for_a_while_is_retried(server):
    down = Server()
    down.server_close()  # Connections are refused from now on.
    clock = RevivingClock(down.port)
    endpoint = Endpoint(
        "unit",
        down.openai + "/chat/completions",
        read_score=lambda answer: float(json.loads(answer["choices"][0]["message"]["content"])["score"]),
        is_final_refusal=lambda answer: False,
        key=ApiKey("UNIT_KEY", header="X-Key"),
        limits=Limits(concurrency=1, queries_per_second=None, timeout=60, give_up_after=600),
        clock=clock,
    )
    body = {"messages": [{"role": "user", "content": "<text-0>text 7</text-0>"}]}
    try:
        assert asyncio.run(endpoint.score([body])) == [7.0]
        assert clock.server.count == {"text 7": 1}
    finally:
        clock.server.stop()


def test_a_server_that_is_never_reached_is_an_error_that_names_it():
    with Server() as gone:
        reward = Perspective(endpoint=gone.perspective, queries_per_second=None, give_up_after=0.2)
    message = error_message(lambda: ask(reward, ["text 1"]))
    assert gone.perspective in message and "ConnectError" in message


def test_a_server_that_dies_and_restarts_receives_only_the_missing_texts(tmp_path):
    first = Server().start()
    port, url = first.port, first.perspective
    texts = [f"text {n}" for n in range(10, 40)]
    for text in texts[10:]:
        first.plan(text, *["reset"] * 50)  # The server is about to die.
    scored, counts = threading.Event(), []

    def die_and_revive():
        while sum(first.count.values()) < 15:
            time.sleep(0.01)
        first.stop()
        time.sleep(0.4)  # Nobody listens.
        with Server(port) as revived:
            scored.wait(60)
        counts.append(revived.count)

    other = threading.Thread(target=die_and_revive)
    other.start()
    reward = Perspective(endpoint=url, queries_per_second=None, concurrency=4, timeout=2, give_up_after=60)
    scorer = Scorer(reward, cache=tmp_path / "c", timeout=120)
    try:
        rewards = scorer(["p"] * 30, texts, [[1]] * 30).rewards[:, 0].tolist()
    finally:
        scored.set()
        other.join()
    assert rewards == [pytest.approx(1 - n / 100) for n in range(10, 40)]
    assert [first.count[text] for text in texts[:10]] == [1] * 10
    assert counts[0] == dict.fromkeys(texts[10:], 1)  # Answered texts are not requested again.


# Refusals


def test_a_text_that_is_refused_for_good_has_no_score_and_is_not_retried():
    service = Service({13: [400]})
    assert asyncio.run(service.endpoint().score([12, 13, 14])) == [12, None, 14]
    assert len(service.requests) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404])
def test_any_other_refusal_is_an_error_at_once(status):
    service = Service({0: [status]}, seconds=1.0)
    with pytest.raises(UserError, match=f"reward 'unit': http://host/score refuses: HTTP {status} "):
        asyncio.run(service.endpoint(concurrency=2).score(range(200)))
    assert len(service.requests) <= 4


def test_an_error_ends_all_other_requests():
    service = Service({0: [403]}, seconds=1.0)
    tasks = []

    async def score():
        with pytest.raises(UserError, match="HTTP 403"):
            await service.endpoint(concurrency=8).score(range(200))
        tasks.extend(asyncio.all_tasks())

    asyncio.run(score())
    assert len(service.requests) <= 16 and len(tasks) == 1  # Only `score` itself is left.


@pytest.mark.parametrize("turns", range(1, 40))
def test_an_error_ends_a_request_whose_answer_arrives_with_it(turns):
    """The answer arrives so many turns of the event loop after the refusal.

    At one of these turns, asyncio.wait_for of Python 3.10 and 3.11 drops the cancellation, and that worker would
    continue alone.
    """
    requests, refused = [], asyncio.Event()

    async def answer(request):
        requests.append(request)
        if len(requests) == 1:
            while len(requests) < 2:
                await asyncio.sleep(0)
            refused.set()
            return httpx2.Response(403, json={"score": 0})
        await refused.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        return httpx2.Response(200, json={"score": 0})

    service = Service()
    service.answer = answer
    with pytest.raises(UserError, match="HTTP 403"):
        asyncio.run(service.endpoint(concurrency=2).score(range(200)))
    assert len(requests) <= 60


def test_the_last_answer_is_quoted_in_one_short_line(server):
    server.plan(ANY, *[(503, b"<h1>\nover\x1b[31mloaded</h1>" + b"x" * 5000)] * 1000)
    scorer = Scorer(perspective(server, give_up_after=0.5))
    message = error_message(lambda: scorer(["p"] * 9, [f"text {i}" for i in range(9)], [[]] * 9))
    pattern = r"gave no usable answer in [0-9]+ s and [0-9]+ requests, the last: HTTP 503 <h1> over \[31mloaded</h1>x+"
    assert re.search(pattern, message) and server.perspective in message and message.endswith("Fix the cause.")
    assert len(message) < 600


# The key


@pytest.mark.parametrize("make", [perspective, judge])
def test_the_key_is_in_the_header_and_nowhere_else(make, server, monkeypatch, caplog):
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    reward = make(server, give_up_after=0.1)
    assert ask(reward, ["text 1"])[0] is not None
    assert KEY in str(server.headers)  # Or this test would prove nothing.
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
    assert not any(KEY[:4] in error for error in errors)  # Nor a part of it in a truncated message.
    texts += [*errors, caplog.text, *(str(record.args) for record in caplog.records)]
    assert "HTTP Request" in caplog.text  # The client's own log was on.
    assert KEY not in "".join(texts)


def test_no_key_is_sent_if_none_is_set(server):
    ask(perspective(server), ["text 1"])
    ask(judge(server), ["text 1"])
    assert not {"x-goog-api-key", "authorization"} & {name.lower() for sent in server.headers for name in sent}


def test_a_key_that_a_header_cannot_hold_is_an_error_that_does_not_show_it(server, monkeypatch):
    for key in ("sécret", "two\nlines", "a b"):
        monkeypatch.setenv("PERSPECTIVE_API_KEY", key)
        message = error_message(lambda: ask(perspective(server), ["text 1"]))
        assert "PERSPECTIVE_API_KEY: must be" in message and key not in message
    monkeypatch.setenv("PERSPECTIVE_API_KEY", f"  {KEY}\n")  # As `cat` prints it.
    assert ask(perspective(server), ["text 1"]) == [0.99]


@pytest.mark.parametrize(
    "endpoint",
    [f"https://host/path?key={KEY}", f"https://user:{KEY}@host/path", f"https://host/#{KEY}", f"ftp://host/{KEY}"],
)
def test_a_key_in_the_address_is_refused_and_not_shown(endpoint):
    for action in (lambda: Perspective(endpoint=endpoint), lambda: Judge(endpoint, "m", "r")):
        message = error_message(action)
        assert KEY not in message and ("API_KEY" in message or "must be http://HOST" in message)
