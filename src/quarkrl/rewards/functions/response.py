"""HTTP responses of scoring services: their JSON, and whether a failed request is worth a retry."""

import json
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

TRANSIENT_STATUSES = (408, 425, 429)  # And 5xx.


class TransientFailure(Exception):
    """A request failed in a way that a retry may cure. The message is the reason, for the user.

    Args:
        reason: what happened.
        retry_after: seconds to wait that the server demands, or None.
    """

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class NoScore(Exception):
    """The service answered in full, but its answer has no score."""


@dataclass(frozen=True)
class Response:
    """An HTTP response that was received in full."""

    status: int
    retry_after: float | None  # Seconds.
    body: bytes

    @property
    def is_transient_failure(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in TRANSIENT_STATUSES or self.status >= 500

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    @property
    def is_client_error(self) -> bool:
        """Whether the status is 4xx."""
        return 400 <= self.status < 500

    def json(self) -> Any:
        """Parse the body.

        Raises:
            TransientFailure: it is not JSON.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise TransientFailure(f"invalid JSON: {self._text}") from None

    @property
    def _text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def __str__(self) -> str:
        return f"HTTP {self.status} {self._text}"


def json_value(answer: Any, *path: str | int) -> Any:
    """Return the value at a path of keys and indices of a JSON answer.

    Raises:
        TransientFailure: the path does not exist.
    """
    try:
        for step in path:
            answer = answer[step]
    except (KeyError, IndexError, TypeError):
        raise TransientFailure(f"an answer without {'.'.join(map(str, path))}") from None
    return answer


def retry_after_seconds(header: str | None) -> float | None:
    """Parse the header Retry-After, seconds or a date (RFC 9110, 10.2.3). Return None if it is neither."""
    if header is None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", header.strip()):
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, TypeError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
