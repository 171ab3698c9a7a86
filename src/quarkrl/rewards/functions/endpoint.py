"""`Endpoint`: score texts over HTTP, with concurrency, a rate limit, retries and a time budget.

Transient failures (a broken connection, a time-out, HTTP 408, 425, 429 and 5xx, an unusable answer) are retried with
increasing waits until `give_up_after`. Any other failure (a wrong key, a wrong address) stops the run with one line.

The API key is read from the environment for each batch and never stored. It is in no attribute, so in no repr, identity
or pickle. It is in no URL, because clients and servers log URLs, and it is removed from the texts that errors quote.
"""

import asyncio
import itertools
import json
import logging
import math
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import anyio

# The successor of httpx, with its interface; huggingface_hub depends on it too.
import httpx2

from quarkrl.errors import UserError, truncate
from quarkrl.rewards.functions.rate_limiter import Clock, RateLimiter, SystemClock
from quarkrl.rewards.functions.response import NoScore, Response, TransientFailure, retry_after_seconds
from quarkrl.rewards.reward import OnScore, discard_score

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # Seconds before a retry. The longest wait also caps Retry-After.
WARN_FROM = 4.0  # Seconds of a wait from which on the user is warned.
ATTEMPTS_FOR_SCORE = 3  # Requests for a text whose answers are complete but have no score.
MAX_ANSWER_BYTES = 1 << 20  # A score needs a few hundred.

_ssl_context = cache(httpx2.create_ssl_context)  # Reading the certificates takes longer than a request.


@dataclass(frozen=True)
class Limits:
    """How fast and how patiently an endpoint is used.

    Attributes:
        concurrency: the largest number of concurrent requests.
        queries_per_second: the largest number of requests per second, retries included; None sets no limit.
        timeout: seconds for a complete answer.
        give_up_after: seconds of retries for one text, after which the run stops.
    """

    concurrency: int
    queries_per_second: float | None
    timeout: float
    give_up_after: float

    def check(self, name: str) -> None:
        """Raise a UserError, which names the reward, for a value that is not a finite number above 0."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"reward {name!r} {field.name} {value}: must be a finite number above 0.")


@dataclass(frozen=True)
class ApiKey:
    """Where an endpoint's key is found, and how it is sent.

    Attributes:
        variable: the environment variable that holds the key.
        header: the HTTP header that carries it.
        prefix: the text before the key in the header.
    """

    variable: str
    header: str
    prefix: str = ""

    def read(self) -> str:
        """Return the key from the environment, or "".

        Raises:
            UserError: it has characters that a header cannot hold. The message does not show them.
        """
        key = os.environ.get(self.variable, "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise UserError(f"{self.variable}: must be a key of ASCII characters without spaces.")
        return key

    def redact(self, text: str) -> str:
        """Replace the key in a text, which a server may have echoed."""
        key = self.read()
        return text.replace(key, "***") if key else text


@dataclass(frozen=True)
class OptionalField:
    """A field of a request's JSON that not every service knows.

    Attributes:
        name: of the field.
        errors: the pattern of the errors that are about the field.
    """

    name: str
    errors: str

    def is_refused(self, response: Response, content: str) -> bool:
        """Whether an error response to a request is about the field."""
        about = re.search(self.errors, str(response), flags=re.IGNORECASE)
        return about is not None and self.name in json.loads(content)

    def remove_from(self, content: str) -> str:
        """Return the request without the field."""
        return json.dumps({name: value for name, value in json.loads(content).items() if name != self.name})


class Endpoint:
    """A service at one address that scores texts.

    Args:
        name: the reward's name, for messages.
        url: where requests are posted; http or https, without a query and without a password.
        read_score: returns the score in a 2xx answer's JSON, or raises `TransientFailure` or `NoScore`.
        is_final_refusal: whether a 4xx answer's JSON refuses this text for good, so that the text has no score.
        key: the API key.
        limits: concurrency, rate limit, time-out and time budget.
        optional_field: a field of the requests that the service may refuse. It is left out from then on.
        clock: the time that waits and budgets are measured in; a seam for tests.
        transport: what carries the requests; a seam for tests. Default: the network.

    Raises:
        UserError: the URL is invalid or contains a secret, or a limit is invalid.
    """

    def __init__(  # noqa: PLR0913 - what differs between services, and two seams for tests
        self,
        name: str,
        url: str,
        *,
        read_score: Callable[[Any], float],
        is_final_refusal: Callable[[Any], bool],
        key: ApiKey,
        limits: Limits,
        optional_field: OptionalField | None = None,
        clock: Clock | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ):
        limits.check(name)
        self.name = name
        self.url = _checked_url(name, url, key.variable)
        self._read_score, self._is_final_refusal = read_score, is_final_refusal
        self._key, self._limits = key, limits
        self._optional_field = optional_field
        self._refuses_optional_field = False
        self._clock = clock or SystemClock()
        self._transport = transport
        self._rate_limiter = RateLimiter(limits.queries_per_second, self._clock)
        self._has_warned = False  # Once is enough, until the endpoint answers again.
        # A generator of its own: a retry must not change the random numbers of training.
        self._random = random.Random()

    async def score(self, bodies: Sequence[Any], on_score: OnScore = discard_score) -> list[float | None]:
        """Return the score of each request body, in order. Equal bodies are sent once.

        Args:
            bodies: JSON-able requests; None is a text that has no score and is not sent.
            on_score: receives the index and score of a body as soon as the score is known.

        Raises:
            UserError: the endpoint refuses, or has given no usable answer for too long.
        """
        contents = [None if body is None else json.dumps(body) for body in bodies]
        rows: dict[str, list[int]] = {}
        for row, content in enumerate(contents):
            if content is not None:
                rows.setdefault(content, []).append(row)
        queue = iter(rows)
        scores: dict[str | None, float | None] = {None: None}

        async def work(client: httpx2.AsyncClient) -> None:
            for content in queue:  # All workers share the queue; each takes the next content.
                scores[content] = await self._score_one(client, content)
                for row in rows[content]:
                    on_score(row, scores[content])

        async with self._client() as client:
            workers = [asyncio.ensure_future(work(client)) for _ in range(self._limits.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [scores[content] for content in contents]

    def _client(self) -> httpx2.AsyncClient:
        """A client for one batch: idle connections would be dead after an hour of training.

        Redirects are not followed, because they could send the key to another host.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := self._key.read():
            headers[self._key.header] = self._key.prefix + key
        return httpx2.AsyncClient(
            headers=headers,
            timeout=self._limits.timeout,
            verify=_ssl_context(),
            limits=httpx2.Limits(max_connections=None),  # The number of workers is the limit.
            transport=self._transport,
        )

    async def _score_one(self, client: httpx2.AsyncClient, content: str) -> float | None:
        """Send one request until it has a score, is refused for good, or the time budget is used up."""
        answers_without_score = 0
        await self._rate_limiter.wait()
        start = self._clock.now()  # The time budget starts here: with a low rate limit, texts wait for hours.
        for attempt in itertools.count(1):
            try:
                return self._classify(await self._post_known_fields(client, content))
            except NoScore:
                answers_without_score += 1
                if answers_without_score == ATTEMPTS_FOR_SCORE:
                    return None
                wait = 0.0
            except TransientFailure as failure:
                wait = self._wait_before_retry(attempt, failure)
                elapsed = self._clock.now() - start
                if elapsed + wait > self._limits.give_up_after:
                    raise self._error(
                        f"gave no usable answer in {elapsed:.0f} s and {attempt} requests, the last: "
                        f"{self._printable(str(failure))}. Fix the cause."
                    ) from None
                self._warn_of(failure, wait)
            await self._clock.sleep(wait)
            await self._rate_limiter.wait()
        raise AssertionError

    def _wait_before_retry(self, attempt: int, failure: TransientFailure) -> float:
        """Seconds to wait: what the server demands, or a random half to whole of a time that doubles each attempt."""
        if failure.retry_after is None:
            return min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(attempt - 1, 10)) * self._random.uniform(0.5, 1)
        wait = min(failure.retry_after, LONGEST_WAIT)
        self._rate_limiter.pause(wait)  # The server's demand concerns every text.
        return wait

    def _classify(self, response: Response) -> float | None:
        """The score in a response, or None for a text that is refused for good.

        Raises:
            TransientFailure, NoScore: the request is worth a retry.
            UserError: any other refusal; it would be the same for every text.
        """
        if response.is_transient_failure:
            raise TransientFailure(str(response), response.retry_after)
        if response.is_success:
            score = self._read_score(response.json())
            self._has_warned = False
            return score
        if self._refuses_text(response):
            return None
        raise self._error(f"refuses: {self._printable(str(response))}")

    def _refuses_text(self, response: Response) -> bool:
        if not response.is_client_error:
            return False
        try:
            return self._is_final_refusal(response.json())
        except TransientFailure:
            return False

    async def _post_known_fields(self, client: httpx2.AsyncClient, content: str) -> Response:
        """Send a request, without the optional field if the service refuses it, now or before."""
        field = self._optional_field
        if field is None:
            return await self._post(client, content)
        if self._refuses_optional_field:
            content = field.remove_from(content)
        response = await self._post(client, content)
        if response.is_success or self._refuses_text(response) or not field.is_refused(response, content):
            return response
        if not self._refuses_optional_field:  # Another worker's request may have been refused meanwhile.
            self._refuses_optional_field = True
            message = "reward %r: %s refuses %s (%s); continuing without it"
            logger.warning(message, self.name, self.url, field.name, self._printable(str(response)))
        await self._rate_limiter.wait()
        return await self._post(client, field.remove_from(content))

    async def _post(self, client: httpx2.AsyncClient, content: str) -> Response:
        """Send a request and read the whole answer within the time-out."""
        try:
            # Not asyncio.wait_for: before Python 3.12 it drops a cancellation that arrives together with an answer.
            with anyio.fail_after(self._limits.timeout):
                async with client.stream("POST", self.url, content=content) as response:
                    body = bytearray()
                    async for chunk in response.aiter_bytes():
                        body += chunk
                        if len(body) > MAX_ANSWER_BYTES:
                            raise TransientFailure(f"an answer of over {MAX_ANSWER_BYTES} bytes")
                    retry_after = retry_after_seconds(response.headers.get("retry-after"))
                    return Response(response.status_code, retry_after, bytes(body))
        except TimeoutError:
            raise TransientFailure(f"no answer within {self._limits.timeout:g} s") from None
        except httpx2.RequestError as error:
            raise TransientFailure(f"{type(error).__name__} {error}") from None

    def _warn_of(self, failure: TransientFailure, wait: float) -> None:
        if wait >= WARN_FROM and not self._has_warned:
            self._has_warned = True
            message = "reward %r: %s fails (%s); retrying for up to %g s"
            logger.warning(message, self.name, self.url, self._printable(str(failure)), self._limits.give_up_after)

    def _error(self, text: str) -> UserError:
        return UserError(f"reward {self.name!r}: {self.url} {text}")

    def _printable(self, text: str) -> str:
        """One line of at most 300 printable characters, without the key."""
        text = self._key.redact(text)
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return truncate(text, 300)  # Truncate last, or half a key could remain.


def _checked_url(name: str, url: str, key_variable: str) -> str:
    """Return `url` if it is valid. The error messages show no part that may be secret."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"reward {name!r} endpoint: must be http://HOST/PATH or https://HOST/PATH.")
    if parts.query or parts.fragment or parts.username is not None:
        raise UserError(
            f"reward {name!r} endpoint {parts.scheme}://{host}…: must have no query and no password. "
            f"Set the key as {key_variable} in the environment."
        )
    return url
