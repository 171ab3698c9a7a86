"""Repetition: how little a completion repeats itself, by its n-grams."""

from collections.abc import Container
from typing import Any, Literal

from quarkrl.errors import UserError
from quarkrl.metrics import diversity


class Repetition:
    """Diversity of the completion, Π over n = 2..4 of (1 - rep-n / 100), in [0, 1] (`metrics.diversity`).

    A completion of fewer than `min_units` units scores 0, the least there is, so that a policy gains nothing by
    saying nothing, or next to nothing: a short text can hardly repeat itself.

    Args:
        unit: count n-grams of "tokens" (the completion's token ids; EOS does not count) or of "words" (what white
            space separates).
        min_units: shorter completions score 0; at least 4, for there to be a 4-gram.

    Raises:
        UserError: an option does not fit.
    """

    unwanted = None
    cached = False  # Arithmetic is faster than a disk.

    def __init__(self, unit: Literal["tokens", "words"] = "tokens", min_units: int = 4) -> None:
        if unit not in ("tokens", "words"):
            raise UserError(f"unit is {unit!r}: 'tokens' or 'words' is wanted")
        if min_units < 4:
            raise UserError(f"min_units is {min_units}: at least 4 is wanted, for there to be a 4-gram")
        self.name = "repetition" if unit == "tokens" else "repetition-words"
        self.identity = {"name": self.name, "unit": unit, "min_units": min_units}
        self._unit = unit
        self._min_units = min_units

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], end_ids: Container[int] = (), **_: Any
    ) -> list[float]:
        """One score per completion, in [0, 1].

        Raises:
            UserError: tokens are to be counted, and there are texts without token ids.
        """
        if self._unit == "words":
            return [self._score(text.split()) for text in completions]
        if any(text and not ids for text, ids in zip(completions, completion_ids, strict=True)):
            raise UserError(
                'reward "repetition" counts token ids, and these texts come without any: take repetition?unit=words'
            )
        return [self._score([i for i in ids if i not in end_ids]) for ids in completion_ids]

    def _score(self, units: list[Any]) -> float:
        return diversity(units) if len(units) >= self._min_units else 0.0
