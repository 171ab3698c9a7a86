"""MAUVE: similarity of completions to human-written texts (Pillutla et al. 2021, package `mauve-text`).

MAUVE compares the distributions of two sets of texts in the feature space of a language model. The feature of a text is
the last layer's hidden state at its last token, prompt included, as the package computes it with GPT-2 large. Here the
features come from the evaluation's perplexity model, so nothing is downloaded. Both sets are truncated to the same
number of tokens. Only the first completion of each prompt counts.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from quarkrl.data.encoding import encode_pairs_as_text
from quarkrl.errors import UserError
from quarkrl.evaluation.intervals import Interval
from quarkrl.models.batching import batches_by_length, right_pad
from quarkrl.sampling.generator import QuarkGenerator

_RESAMPLES = 200
_SEED = 25  # The package's default.
_MIN_TEXTS = 20


def load_mauve() -> Any:
    """Import the module of `mauve-text` that computes MAUVE.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from mauve import compute_mauve  # Extra "mauve", which also installs faiss.
    except ImportError as error:
        raise UserError(f'human_column: MAUVE needs the extra: pip install "quarkrl[mauve]" ({error}).') from error
    return sys.modules[compute_mauve.__module__]


def mauve(generated: np.ndarray, human: np.ndarray) -> tuple[float, Interval]:
    """Compute MAUVE and its 95 % bootstrap confidence interval.

    The interval is the estimate ± 1.96 standard deviations of MAUVE under resampling, with fixed clusters. A
    percentile interval would be biased: noise lowers MAUVE and resampling adds noise, so the percentiles can lie below
    the estimate. MAUVE rises with the number of texts; compare only values of equally many.

    Args:
        generated, human: `(n, d)` features.

    Returns:
        MAUVE in (0, 1], where 1 means indistinguishable, and the interval.

    Raises:
        UserError: the package is not installed, or there are too few texts to cluster.
    """
    package = load_mauve()
    if min(len(generated), len(human)) < _MIN_TEXTS:
        raise UserError(
            f"MAUVE of {len(generated)} completions and {len(human)} human texts: must be at least {_MIN_TEXTS} of "
            "each. Use thousands for a reliable value."
        )
    with _silence_stderr():
        result = package.compute_mauve(p_features=generated, q_features=human, seed=_SEED)
    rng = np.random.default_rng(_SEED)
    resampled = []
    for _ in range(_RESAMPLES):
        p = rng.multinomial(len(generated), result.p_hist) / len(generated)
        q = rng.multinomial(len(human), result.q_hist) / len(human)
        resampled.append(_mauve_of_histograms(package, p, q))
    half_width = 1.96 * float(np.std(resampled))
    value = float(result.mauve)
    return value, (max(0.0, value - half_width), min(1.0, value + half_width))


def text_features(
    generator: QuarkGenerator, prompts: Sequence[str], texts: Sequence[str], max_tokens: int, batch_size: int
) -> np.ndarray:
    """Return `(n, d)` features: the last hidden state over each prompt and the first `max_tokens` tokens of its text.

    Raises:
        UserError: a prompt and its text have no tokens.
    """
    pairs = encode_pairs_as_text(generator.tokenizer, prompts, texts, add_special_tokens=False)
    rows = [tuple((*head, *tail[:max_tokens])[-generator.context_length :]) for head, tail in pairs]
    distinct = list(dict.fromkeys(rows))
    if not all(distinct):
        raise UserError("MAUVE: a prompt and its text have no tokens. Remove that row.")
    states: dict[tuple[int, ...], np.ndarray] = {}
    for batch in batches_by_length(distinct, [len(row) for row in distinct], batch_size):
        states.update(zip(batch, _last_states(generator.model, batch), strict=True))
    return np.stack([states[row] for row in rows])


@torch.inference_mode()
def _last_states(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """`(n, d)`: the last layer's hidden state at the last token of each row."""
    ids, mask = right_pad(rows, model.device)
    states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    last = torch.tensor([len(row) - 1 for row in rows], device=states.device)
    return states[torch.arange(len(rows)), last].float().cpu().numpy()


def _mauve_of_histograms(package: Any, p: np.ndarray, q: np.ndarray) -> float:
    """MAUVE of two histograms over clusters, computed as `compute_mauve` does."""
    weights = np.linspace(1e-6, 1 - 1e-6, 25)
    x, y = package.get_divergence_curve_for_multinomials(p, q, weights, 5).T
    first, second = np.argsort(x), np.argsort(y)
    area = package.compute_area_under_curve
    return 0.5 * float(area(x[first], y[first]) + area(y[second], x[second]))


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Discard output to file descriptor 2.

    Faiss warns there, from C++, about clusterings with fewer than 39 points per cluster. MAUVE uses 20.
    """
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
