"""`Repetition`: the share of a completion's n-grams that are not repeated."""

from collections.abc import Container
from typing import Any, Literal

from quarkrl.errors import UserError
from quarkrl.metrics import diversity


class Repetition:
    """Diversity of the completion, Π over n = 2..4 of (1 - rep-n / 100), in [0, 1] (`metrics.diversity`).

    A completion of fewer than `min_units` units scores 0, the minimum. A short text hardly repeats itself, so without
    this rule a policy could raise its reward by saying nothing.

    Args:
        unit: count n-grams of "tokens" (the completion's token ids without EOS) or of "words" (separated by white
            space).
        min_units: shorter completions score 0. At least 4, the length of a 4-gram.

    Raises:
        UserError: an option is invalid.
    """

    unwanted = None
    cached = False  # Computing a score is faster than reading it from a disk.
    completions_as_text = True

    def __init__(self, unit: Literal["tokens", "words"] = "tokens", min_units: int = 4) -> None:
        if unit not in ("tokens", "words"):
            raise UserError(f"reward 'repetition' unit {unit!r}: must be 'tokens' or 'words'.")
        if min_units < 4:
            raise UserError(f"reward 'repetition' min_units {min_units}: must be at least 4, the length of a 4-gram.")
        self.name = "repetition" if unit == "tokens" else "repetition-words"
        self.identity = {"name": self.name, "unit": unit, "min_units": min_units}
        self._unit = unit
        self._min_units = min_units

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], end_ids: Container[int] = (), **_: Any
    ) -> list[float]:
        """One score per completion, in [0, 1].

        Raises:
            UserError: the unit is tokens and a text has no token ids.
        """
        if self._unit == "words":
            return [self._score(text.split()) for text in completions]
        if any(text and not ids for text, ids in zip(completions, completion_ids, strict=True)):
            raise UserError(
                "reward 'repetition' unit 'tokens': must be 'words', because these texts have no token ids. "
                "Use repetition?unit=words."
            )
        return [self._score([i for i in ids if i not in end_ids]) for ids in completion_ids]

    def _score(self, units: list[Any]) -> float:
        return diversity(units) if len(units) >= self._min_units else 0.0
