"""`Profanity`: the package `alt-profanity-check`, a linear model over word n-grams; offline and fast."""

import warnings
from typing import Any

from quarkrl.errors import UserError
from quarkrl.rewards.identity import library_version


class Profanity:
    """1 - P(profane) of the completion, in [0, 1].

    Raises:
        UserError: the package `alt-profanity-check` is not installed.
    """

    name = "profanity"
    unwanted = "toxicity"
    completions_as_text = True

    def __init__(self) -> None:
        try:
            # Optional (extra "offline"). The import loads the model that the package contains.
            from sklearn.exceptions import InconsistentVersionWarning

            with warnings.catch_warnings():
                # The user cannot change the scikit-learn version that the package was built with.
                warnings.simplefilter("ignore", InconsistentVersionWarning)
                from profanity_check import predict_prob

            versions = {package: library_version(package) for package in ("alt-profanity-check", "scikit-learn")}
        except ImportError as error:
            raise UserError(f"reward 'profanity': {error}. Run pip install \"quarkrl[offline]\".") from error
        self._predict_prob = predict_prob
        self.identity = {"name": self.name, **versions}

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        """One score per completion."""
        # scikit-learn refuses an empty batch.
        return [1.0 - float(p) for p in self._predict_prob(completions)] if completions else []
