"""`Brevity`: how short a completion is, if it ends."""

import re
from typing import Any

from quarkrl.errors import UserError

_END = re.compile(r"""[.!?…。！？]["'”’»)\]*]*\s*\Z""")


class Brevity:
    """The share of `max_words` that a completion leaves unused, in [0, 1].

    A completion that does not end with a full stop, `!` or `?` is probably cut off. It counts a quarter of `max_words`
    more. One without words scores 0, the minimum.

    Args:
        max_words: completions of this number of words score 0.

    Raises:
        UserError: `max_words` is below 1.
    """

    unwanted = None
    cached = False  # Computing a score is faster than reading it from a disk.
    completions_as_text = True
    name = "brevity"

    def __init__(self, max_words: int = 80) -> None:
        if max_words < 1:
            raise UserError(f"reward 'brevity' max_words {max_words}: must be at least 1. The default is 80.")
        self.identity = {"name": self.name, "max_words": max_words}
        self._max_words = max_words

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        """One score per completion, in [0, 1]."""
        return [self._score(text) for text in completions]

    def _score(self, text: str) -> float:
        words = len(text.split())
        if not words:
            return 0.0
        used = words + (0 if _END.search(text) else self._max_words / 4)
        return max(0.0, 1 - used / self._max_words)
