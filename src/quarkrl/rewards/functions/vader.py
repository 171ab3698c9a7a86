"""`Vader`: sentiment by a lexicon with rules, offline (VADER; Hutto and Gilbert, ICWSM 2014)."""

from typing import Any

from quarkrl.errors import UserError
from quarkrl.rewards.identity import library_version


class Vader:
    """VADER's compound score of the completion, in [-1, 1], or its negative.

    Args:
        negative: return -1 times the score.

    Raises:
        UserError: the package `vaderSentiment` is not installed.
    """

    unwanted = None
    wanted_from = 0.05  # The authors' threshold between neutral and positive, or negative.
    completions_as_text = True

    def __init__(self, negative: bool = False) -> None:
        try:
            # Optional (extra "offline").
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

            version = library_version("vaderSentiment")
        except ImportError as error:
            raise UserError(f"reward 'vader': {error}. Run pip install \"quarkrl[offline]\".") from error
        self.name = "vader-negative" if negative else "vader"
        self.identity = {"name": self.name, "vaderSentiment": version}
        self.wanted = "negative" if negative else "positive"
        self._sign = -1.0 if negative else 1.0
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        """One score per completion."""
        # + 0.0 turns -0, which -1 · 0 gives, into 0.
        return [self._sign * self._analyzer.polarity_scores(text)["compound"] + 0.0 for text in completions]
