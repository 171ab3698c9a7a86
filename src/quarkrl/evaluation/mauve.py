"""MAUVE: how like people's text the completions are (Pillutla et al. 2021, the package `mauve-text`).

MAUVE compares two sets of texts by the features that a language model finds in them; here those of any given model,
so that nothing is downloaded: the last layer's state at the text's last token, prompt included, as the package takes
them from GPT-2 large. Both sides are cut to the same number of tokens. One completion of each prompt counts, the first.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from quarkrl.errors import UserError
from quarkrl.evaluation.intervals import Interval
from quarkrl.evaluation.perplexity import by_length
from quarkrl.sampling.generator import QuarkGenerator

_RESAMPLES = 200
_SEED = 25  # The package's own.


def load_mauve() -> Any:
    """The package's module that computes.

    Raises:
        UserError: it is not installed.
    """
    try:
        from mauve import compute_mauve  # Extra "mauve"; brings faiss.
    except ImportError as error:
        raise UserError(f'MAUVE needs pip install "quarkrl[mauve]" ({error})') from error
    return sys.modules[compute_mauve.__module__]


def mauve(generated: np.ndarray, human: np.ndarray) -> tuple[float, Interval]:
    """MAUVE in (0, 1], 1 for sets that cannot be told apart, and its 95 % bootstrap interval.

    The interval is the estimate ± 1.96 standard deviations of MAUVE under resampling, with the clusters held fixed.
    Not the percentile one: MAUVE falls with every bit of noise, resampling adds noise, and its percentiles can lie
    below the estimate itself. Compare only MAUVE of equally many texts: it rises with their number.

    Args:
        generated, human: `(n, d)` features.

    Raises:
        UserError: the package is missing, or there are too few texts to cluster.
    """
    package = load_mauve()
    if min(len(generated), len(human)) < 20:
        raise UserError(f"MAUVE of {len(generated)} and {len(human)} texts: want at least 20 of each, better thousands")
    with _without_stderr():
        found = package.compute_mauve(p_features=generated, q_features=human, seed=_SEED)
    rng = np.random.default_rng(_SEED)
    resampled = []
    for _ in range(_RESAMPLES):
        p = rng.multinomial(len(generated), found.p_hist) / len(generated)
        q = rng.multinomial(len(human), found.q_hist) / len(human)
        resampled.append(_area(package, p, q))
    half = 1.96 * float(np.std(resampled))
    value = float(found.mauve)
    return value, (max(0.0, value - half), min(1.0, value + half))


def features(
    generator: QuarkGenerator, prompts: Sequence[str], texts: Sequence[str], max_tokens: int, batch_size: int
) -> np.ndarray:
    """`(n, d)`: the model's last state over each prompt and the first `max_tokens` tokens of its text."""
    tokenizer, room = generator.tokenizer, generator.context_length
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]
        rows.append(tuple((*head, *tail)[-room:]))
    distinct = list(dict.fromkeys(rows))
    if not all(distinct):
        raise UserError("MAUVE of a text without tokens: leave it out")
    states: dict[tuple[int, ...], np.ndarray] = {}
    for batch in by_length(distinct, [len(row) for row in distinct], batch_size):
        states.update(zip(batch, _last_states(generator.model, batch), strict=True))
    return np.stack([states[row] for row in rows])


@torch.inference_mode()
def _last_states(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> np.ndarray:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    last = torch.tensor([len(row) - 1 for row in rows], device=states.device)
    return states[torch.arange(len(rows)), last].float().cpu().numpy()


def _area(package: Any, p: np.ndarray, q: np.ndarray) -> float:
    """MAUVE of two histograms, as `compute_mauve` has it from its own."""
    weights = np.linspace(1e-6, 1 - 1e-6, 25)
    x, y = package.get_divergence_curve_for_multinomials(p, q, weights, 5).T
    first, second = np.argsort(x), np.argsort(y)
    area = package.compute_area_under_curve
    return 0.5 * float(area(x[first], y[first]) + area(y[second], x[second]))


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Faiss warns from C++, on file descriptor 2, of every clustering with fewer than 39 points a cluster.

    MAUVE's own choice is 20.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
