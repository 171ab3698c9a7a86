"""`Perspective`: the Perspective API for comments, or any service that speaks its protocol.

The original service ends on 31 December 2026 and issues no new keys. docs/rewards.md names alternatives.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from quarkrl.errors import UserError
from quarkrl.rewards.functions.endpoint import ApiKey, Endpoint, Limits
from quarkrl.rewards.functions.response import TransientFailure, json_value
from quarkrl.rewards.reward import OnScore, discard_score

OFFICIAL = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
MAX_TEXT_BYTES = 20_480  # Of UTF-8.
# Errors of the text. Others, such as NO_REQUESTED_ATTRIBUTES or a wrong key, are errors of every request.
TEXT_ERRORS = {
    "COMMENT_EMPTY",
    "COMMENT_TOO_LONG",
    "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE",
    "LANGUAGE_DETECTION_FAILED",
}


class Perspective:
    """1 - the score of an attribute, in [0, 1]. The key is read from the environment, PERSPECTIVE_API_KEY.

    Blank texts and texts of over 20,480 bytes, which the API refuses, are not sent and have no score. Long texts are
    not truncated: a model would learn to write the worst at the end.

    Args:
        attribute: what is scored, such as TOXICITY, INSULT or THREAT.
        endpoint: the address of the service. Default: the original service.
        queries_per_second: the largest number of requests per second, retries included; 1 is the original's quota.
            None sets no limit.
        concurrency: the largest number of concurrent requests.
        languages: the languages of the texts.
        timeout: seconds for an answer.
        give_up_after: seconds of retries for one text, after which the run stops.

    Raises:
        UserError: an option is invalid, or the endpoint is the original service and there is no key.
    """

    completions_as_text = True

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
            raise UserError(f"reward 'perspective' attribute {attribute!r}: must be a name, such as TOXICITY.")
        self._languages = [languages] if isinstance(languages, str) else list(languages)
        self.name = f"perspective-{self._attribute.lower()}"
        self.unwanted = self._attribute.lower()
        self.reads = ("completions",)
        self.limits = Limits(concurrency, queries_per_second, timeout, give_up_after)
        # The key is not sent as ?key=…, as the documentation proposes, because URLs are logged. All of Google's APIs
        # accept this header.
        key = ApiKey("PERSPECTIVE_API_KEY", header="x-goog-api-key")
        self._endpoint = Endpoint(
            self.name,
            endpoint,
            read_score=self._read_score,
            is_final_refusal=_is_text_error,
            key=key,
            limits=self.limits,
        )
        if urlsplit(endpoint).hostname == urlsplit(OFFICIAL).hostname and not key.read():
            raise UserError(
                "PERSPECTIVE_API_KEY: must be set for the original service, which ends on 31 December 2026. "
                "Or set endpoint=URL of a compatible service, or use a classifier."
            )
        self.identity = {
            "name": self.name,
            "endpoint": self._endpoint.url,
            "attribute": self._attribute,
            "languages": self._languages,
        }

    async def __call__(self, completions: list[str], on_score: OnScore = discard_score, **_: Any) -> list[float | None]:
        """One score per completion, or None for a text that the service cannot score."""
        return await self._endpoint.score([self._request(text) for text in completions], on_score)

    def _request(self, text: str) -> dict[str, Any] | None:
        if not text.strip() or len(text.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
            return None
        return {
            "comment": {"text": text},
            "languages": self._languages,
            "requestedAttributes": {self._attribute: {}},
            "doNotStore": True,
        }

    def _read_score(self, answer: Any) -> float:
        value = json_value(answer, "attributeScores", self._attribute, "summaryScore", "value")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            raise TransientFailure(f"a score that is not from 0 to 1: {value}")
        return 1.0 - value


def _is_text_error(answer: Any) -> bool:
    details = json_value(answer, "error", "details")
    details = details if isinstance(details, list) else []
    return any(isinstance(detail, dict) and str(detail.get("errorType")) in TEXT_ERRORS for detail in details)
