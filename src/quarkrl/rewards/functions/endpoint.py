"""What rewards over HTTP share: pace, patience, and not a word of the key.

An `Endpoint` is sent one JSON body per text, several at a time and no faster than it allows. What may pass (a broken
connection, a time-out, 408, 425, 429, 5xx, an answer that cannot be read) is asked again, later and later, until
`give_up_after`; what will not (a wrong key, a wrong address) stops the run at once, in one line.

The key comes from the environment for each batch and is kept nowhere: not in an attribute, so not in a repr, an
identity or a pickle; never in a URL, which clients and servers log; and it is cut out of what errors quote.
"""

import asyncio
import itertools
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import anyio

# The continuation of httpx, with its interface; huggingface_hub stands on it too.
import httpx2

from quarkrl.errors import UserError

logger = logging.getLogger(__name__)

OnScore = Callable[[int, float | None], None]

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before asking again; the longest also caps Retry-After
TOLD_FROM = 4.0  # seconds of a wait that the user is told of
TRIES_FOR_SCORE = 3  # for an answer that is whole, but holds no score
LARGEST_ANSWER = 1 << 20  # bytes; a score takes some hundred

_tls = cache(httpx2.create_ssl_context)  # reading the certificates takes longer than a question


class Fault(Exception):
    """An answer that is none; its text says why, for the user. It is asked for again."""


class NoScore(Exception):
    """A whole answer without a score: asked for again at once, `TRIES_FOR_SCORE` times in all, then None."""


class Endpoint:
    """One address that scores texts.

    Args:
        name: the reward's, for messages.
        url: where to post; http or https, without a query and without a password.
        score: makes a score of a 2xx's JSON, or raises `Fault` or `NoScore`.
        final: says of any other 4xx's JSON whether it is the last word on this text, which then has no score.
        key_variable, key_header, key_prefix: the environment's variable with the key, and how it is sent, if it is set.
        concurrency: questions under way at a time, at most.
        queries_per_second: questions sent a second, at most, repeated ones included; None for no limit.
        timeout: seconds for a whole answer.
        give_up_after: seconds of asking in vain for one text, after which the run stops.

    Raises:
        UserError: the URL is none, or holds what belongs into the environment; a number is not positive.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        score: Callable[[Any], float],
        final: Callable[[Any], bool],
        key_variable: str,
        key_header: str,
        key_prefix: str = "",
        concurrency: int,
        queries_per_second: float | None,
        timeout: float,
        give_up_after: float,
    ):
        limits = {"concurrency": concurrency, "queries_per_second": queries_per_second, "timeout": timeout}
        for option, value in {**limits, "give_up_after": give_up_after}.items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"reward {name!r}: {option} is {value}: a number above 0 is wanted")
        self.name = name
        self.url = _checked_url(name, url, key_variable)
        self._score, self._final = score, final
        self._key_variable, self._key_header, self._key_prefix = key_variable, key_header, key_prefix
        self._concurrency = concurrency
        self._interval = 1 / queries_per_second if queries_per_second else 0.0
        self._timeout, self._give_up_after = timeout, give_up_after
        self._next = 0.0  # when the next question may go, in seconds of time.monotonic
        self._told = False  # that the endpoint fails; until it answers, once is enough
        # Of its own: a repeated question must not move the random numbers that training draws.
        self._random = random.Random()

    def key(self) -> str:
        """The key from the environment, or "".

        Raises:
            UserError: it has characters that no header takes; the message does not show them.
        """
        key = os.environ.get(self._key_variable, "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise UserError(f"reward {self.name!r}: {self._key_variable} holds no key: it has spaces or no ASCII")
        return key

    async def ask(self, bodies: Sequence[Any], on_score: OnScore = lambda row, score: None) -> list[float | None]:
        """The score of each body, in their order; equal bodies are sent once, and None has no score.

        Args:
            bodies: the questions.
            on_score: called with a body's place and score as soon as that is known.

        Raises:
            UserError: the endpoint refuses, or has given no usable answer for too long.
        """
        contents = [None if body is None else json.dumps(body) for body in bodies]
        rows: dict[str, list[int]] = {}
        for row, content in enumerate(contents):
            if content is not None:
                rows.setdefault(content, []).append(row)
        waiting = iter(rows)
        scores: dict[str | None, float | None] = {None: None}

        async def work(client: httpx2.AsyncClient) -> None:
            for content in waiting:  # shared by all workers: each takes the next
                scores[content] = await self._ask(client, content)
                for row in rows[content]:
                    on_score(row, scores[content])

        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := self.key():
            headers[self._key_header] = self._key_prefix + key
        # A client for each call: connections that idled through an hour of training would be dead, and none
        # outlives its event loop. Redirects are not followed: they could take the key elsewhere.
        limits = httpx2.Limits(max_connections=None)  # the workers are the limit
        async with httpx2.AsyncClient(headers=headers, timeout=self._timeout, verify=_tls(), limits=limits) as client:
            workers = [asyncio.ensure_future(work(client)) for _ in range(self._concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [scores[content] for content in contents]

    async def _ask(self, client: httpx2.AsyncClient, content: str) -> float | None:
        scoreless = 0
        await self._turn()
        began = time.monotonic()  # not before: a slow pace makes texts wait for hours, by design
        for tries in itertools.count(1):
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(tries - 1, 10)) * self._random.uniform(0.5, 1)
            problem = ""
            try:
                # Not asyncio.wait_for, which before Python 3.12 drops a cancellation that meets an answer.
                with anyio.fail_after(self._timeout):
                    status, retry_after, body = await self._post(client, content)
                if status in (408, 425, 429) or status >= 500:
                    problem = _shown(status, body)
                    if retry_after is not None:
                        wait = min(retry_after, LONGEST_WAIT)
                        self._next = max(self._next, time.monotonic() + wait)  # it concerns every text
                elif 200 <= status < 300:
                    score = self._score(_parsed(body))
                    self._told = False
                    return score
                elif 400 <= status < 500 and self._is_final(body):
                    return None
                else:
                    raise self._error(f"refuses: {self._cleaned(_shown(status, body))}")
            except NoScore:
                scoreless += 1
                if scoreless == TRIES_FOR_SCORE:
                    return None
                wait = 0.0
            except Fault as fault:
                problem = str(fault)
            except TimeoutError:
                problem = f"no answer within {self._timeout:g} s"
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__} {error}"
            passed = time.monotonic() - began
            if problem and passed + wait > self._give_up_after:
                raise self._error(
                    f"gave no usable answer in {passed:.0f} s and {tries} tries, the last: {self._cleaned(problem)}; "
                    "see to it and run again, or resume the run"
                )
            if wait >= TOLD_FROM and not self._told:
                self._told = True
                message = "reward %r: %s fails (%s); asking again for up to %g s"
                logger.warning(message, self.name, self.url, self._cleaned(problem), self._give_up_after)
            await asyncio.sleep(wait)
            await self._turn()
        raise AssertionError

    async def _turn(self) -> None:
        """Waits until a question may go: a token bucket that holds one token, so that none go in a burst."""
        while (wait := self._next - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._next = time.monotonic() + self._interval

    async def _post(self, client: httpx2.AsyncClient, content: str) -> tuple[int, float | None, bytes]:
        """Status, Retry-After in seconds, and body."""
        async with client.stream("POST", self.url, content=content) as response:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > LARGEST_ANSWER:
                    raise Fault(f"an answer of over {LARGEST_ANSWER} bytes")
            return response.status_code, _seconds(response.headers.get("retry-after")), bytes(body)

    def _is_final(self, body: bytes) -> bool:
        try:
            return self._final(_parsed(body))
        except Fault:
            return False

    def _error(self, text: str) -> UserError:
        return UserError(f"reward {self.name!r}: {self.url} {text}")

    def _cleaned(self, text: str) -> str:
        """In one line of printable characters, not endless, and without the key, which a server may echo."""
        if key := self.key():
            text = text.replace(key, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= 300 else text[:299] + "…"  # cut last, or half a key could stay


def field(answer: Any, *path: str | int) -> Any:
    """What stands at a path of keys and indices in a JSON answer.

    Raises:
        Fault: nothing does.
    """
    try:
        for step in path:
            answer = answer[step]
    except (KeyError, IndexError, TypeError):
        raise Fault(f"an answer without {'.'.join(map(str, path))}") from None
    return answer


def _checked_url(name: str, url: str, key_variable: str) -> str:
    """`url`, where it is one; the messages show no part that may be secret."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"reward {name!r}: its endpoint is no address: http://HOST/PATH or https://… is wanted")
    if parts.query or parts.fragment or parts.username is not None:
        where = f"{parts.scheme}://{host}…"
        raise UserError(
            f"reward {name!r}: endpoint {where} has a query or a password: leave it out; a key is set by {key_variable}"
        )
    return url


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Fault(f"an answer that is no JSON: {body.decode('utf-8', 'replace')}") from None


def _shown(status: int, body: bytes) -> str:
    return f"HTTP {status} {body.decode('utf-8', 'replace')}"


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After, seconds or a date (RFC 9110, 10.2.3); None where it is neither."""
    if retry_after is None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", retry_after.strip()):
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except (ValueError, TypeError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
