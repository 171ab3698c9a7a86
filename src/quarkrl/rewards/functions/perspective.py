"""Perspective, the comment-scoring API, or any service that speaks its protocol.

The original service ends on 31 December 2026 and gives out no new keys: see docs/rewards.md for what to use instead.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from quarkrl.errors import UserError
from quarkrl.rewards.functions.endpoint import Endpoint, Fault, OnScore, field

OFFICIAL = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
LARGEST_TEXT = 20_480  # bytes of UTF-8
# The error types that speak of the text; others (NO_REQUESTED_ATTRIBUTES, a wrong key) speak of the request.
FINAL = {
    "COMMENT_EMPTY",
    "COMMENT_TOO_LONG",
    "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE",
    "LANGUAGE_DETECTION_FAILED",
}


class Perspective:
    """1 - the score of an attribute, in [0, 1], of each completion; the key comes from PERSPECTIVE_API_KEY.

    None, without asking, for a text that is blank or of over 20,480 bytes, which the API refuses: a text scored by its
    beginning would teach a model to keep the rest for later.

    Args:
        attribute: what is scored, such as TOXICITY, INSULT or THREAT.
        endpoint: the address that is posted to; the original service by default.
        queries_per_second: at most, repeated ones included; 1 is the original's quota. None for no limit.
        concurrency: questions under way at a time, at most.
        languages: of the texts.
        timeout: seconds for an answer.
        give_up_after: seconds of asking in vain for one text, after which the run stops.

    Raises:
        UserError: an option does not fit, or there is no key and the endpoint is the original service.
    """

    def __init__(
        self,
        attribute: str = "TOXICITY",
        endpoint: str = OFFICIAL,
        queries_per_second: float | None = 1.0,
        concurrency: int = 8,
        languages: Sequence[str] = ("en",),
        timeout: float = 30.0,
        give_up_after: float = 600.0,
    ):
        self._attribute = attribute.strip().upper()
        if not self._attribute:
            raise UserError("reward 'perspective': attribute is empty: give one, such as TOXICITY")
        self._languages = [languages] if isinstance(languages, str) else list(languages)
        self.name = f"perspective-{self._attribute.lower()}"
        self.unwanted = self._attribute.lower()
        self.reads = ("completions",)
        self._endpoint = Endpoint(
            self.name,
            endpoint,
            score=self._score,
            final=_is_final,
            key_variable="PERSPECTIVE_API_KEY",
            # Not as ?key=…, the documentation's way: URLs are logged. All of Google's APIs take this header.
            key_header="x-goog-api-key",
            concurrency=concurrency,
            queries_per_second=queries_per_second,
            timeout=timeout,
            give_up_after=give_up_after,
        )
        if urlsplit(endpoint).hostname == urlsplit(OFFICIAL).hostname and not self._endpoint.key():
            raise UserError(
                "reward 'perspective': PERSPECTIVE_API_KEY is not set: set it, or give endpoint=URL of a compatible "
                "service, or use a classifier (the original service ends on 31 December 2026)"
            )
        self.identity = {
            "name": self.name,
            "endpoint": self._endpoint.url,
            "attribute": self._attribute,
            "languages": self._languages,
        }

    async def __call__(
        self, completions: list[str], on_score: OnScore = lambda row, score: None, **_: Any
    ) -> list[float | None]:
        return await self._endpoint.ask([self._body(text) for text in completions], on_score)

    def _body(self, text: str) -> dict[str, Any] | None:
        if not text.strip() or len(text.encode("utf-8", "replace")) > LARGEST_TEXT:
            return None
        return {
            "comment": {"text": text},
            "languages": self._languages,
            "requestedAttributes": {self._attribute: {}},
            "doNotStore": True,
        }

    def _score(self, answer: Any) -> float:
        value = field(answer, "attributeScores", self._attribute, "summaryScore", "value")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            raise Fault(f"no score from 0 to 1, but {value}")
        return 1.0 - value


def _is_final(answer: Any) -> bool:
    details = field(answer, "error", "details")
    details = details if isinstance(details, list) else []
    return any(isinstance(detail, dict) and str(detail.get("errorType")) in FINAL for detail in details)
