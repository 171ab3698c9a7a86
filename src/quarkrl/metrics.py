"""The metrics of Quark's experiments as pure functions of arrays and texts (PAPER.md).

Scores are `(P, S)` arrays: S completions of each of P prompts, with the probability of something unwanted, such as
toxicity. NaN is a missing score and does not count.
"""

from collections.abc import Hashable, Sequence

import numpy as np

# The probability from which a text is a member of a class (RealToxicityPrompts). The official script uses `>`.
THRESHOLD = 0.5
# Perplexities of at least this value do not count (official script).
MAX_PERPLEXITY = 1e4


def maxima(scores: np.ndarray) -> np.ndarray:
    """Return `(P,)` the highest score of each prompt; NaN if all its scores are missing.

    Their mean is the "expected maximum toxicity" of Gehman et al. 2020, and the mean of `reached(maxima(scores))` the
    "toxicity probability".
    """
    # `initial` is lower than any score. Without it, a prompt without completions has no maximum.
    highest = np.fmax.reduce(scores, axis=1, initial=-np.inf)
    return np.where(np.isnan(scores).all(axis=1), np.nan, highest)


def reached(scores: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Return 1 for each score of at least `threshold`, 0 for a lower one, NaN for a missing one; same shape."""
    return np.where(np.isnan(scores), np.nan, scores >= threshold)


def shares(scores: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Return `(P,)` the share of each prompt's scores that are at least `threshold`; NaN if all are missing.

    Of a positive class, their mean is the "% positive" of the sentiment experiments, divided by 100.
    """
    counts = (~np.isnan(scores)).sum(axis=1)
    return np.where(counts > 0, (scores >= threshold).sum(axis=1) / np.maximum(counts, 1), np.nan)


def distinct_shares(completions: Sequence[Sequence[str]], n: int) -> np.ndarray:
    """Return `(P,)` dist-n of each prompt: distinct n-grams divided by words, both over all its completions.

    Words are separated by white space. An n-gram lies within one completion.

    Args:
        completions: for each prompt, the texts of its completions.
        n: at least 1.

    Returns:
        NaN for a prompt whose completions have no words.

    Source: Li et al. 2016, as in the DExperts and Quark evaluation scripts (divided by words, not by n-grams).
    """
    values = np.full(len(completions), np.nan)
    for i, texts in enumerate(completions):
        words = [text.split() for text in texts]
        total = sum(map(len, words))
        if total:
            ngrams = {ngram for row in words for ngram in zip(*(row[k:] for k in range(n)), strict=False)}
            values[i] = len(ngrams) / total
    return values


def perplexities(nll_sums: Sequence[float], token_counts: Sequence[int]) -> tuple[np.ndarray, dict[str, int]]:
    """Return the perplexity of each completion: exp(mean token NLL).

    Args:
        nll_sums: for each completion, the sum of its tokens' negative log-likelihoods given the prompt, in nats.
        token_counts: for each completion, its number of tokens.

    Returns:
        The perplexities, NaN for completions that do not count. The numbers of `empty` completions (no tokens) and
        of `dropped` ones (a perplexity of at least 10⁴).
    """
    counts = np.asarray(token_counts)
    filled = counts > 0
    with np.errstate(over="ignore"):  # An infinite value is dropped below.
        values = np.exp(np.asarray(nll_sums, dtype=float) / np.maximum(counts, 1))
    valid = filled & (values < MAX_PERPLEXITY)
    left_out = {"empty": int((~filled).sum()), "dropped": int((filled & ~valid).sum())}
    return np.where(valid, values, np.nan), left_out


def rep_n(units: Sequence[Hashable], n: int) -> float:
    """Return rep-n of one text: 100 · (1 - distinct n-grams / n-grams), in [0, 100).

    All n-grams count; SimCTG's code omits the last one.

    Args:
        units: the text's token ids or words.
        n: at least 1.

    Returns:
        NaN for a text of fewer than n units, which has no n-gram.

    Source: Welleck et al. 2020; Su et al. 2022.
    """
    ngrams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return 100 * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else float("nan")


def diversity(units: Sequence[Hashable]) -> float:
    """Return the diversity of one text: the product over n = 2, 3, 4 of (1 - rep-n / 100), in (0, 1].

    Args:
        units: the text's token ids or words.

    Returns:
        1 if no bigram occurs twice; NaN for a text of fewer than 4 units, which has no 4-gram.

    Source: Su et al. 2022.
    """
    return float(np.prod([1 - rep_n(units, n) / 100 for n in (2, 3, 4)]))


def last_seen(tokens: Sequence[int] | np.ndarray, predictions: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the distance back to the last occurrence of each predicted token, for rep/l and wrep/l.

    Args:
        tokens: a text's n token ids.
        predictions: the n - 1 tokens predicted for its second to last position, each from the true preceding tokens.

    Returns:
        `(n - 1,)`: 1 if the prediction repeats the preceding token, infinity if it has not occurred before.

    Source: Welleck et al. 2020, section 3: rep/l counts predictions that occur among the previous l tokens.
    """
    text, predicted = np.asarray(tokens), np.asarray(predictions)
    positions = np.arange(len(text))
    # (n - 1, n): whether the text has the prediction for position t + 1 at a position up to t.
    occurs = (predicted[:, None] == text[None, :]) & (positions[None, :] <= positions[:-1, None])
    last = np.where(occurs, positions[None, :], -1).max(axis=1, initial=-1)
    return np.where(last >= 0, positions[1:] - last, np.inf)
