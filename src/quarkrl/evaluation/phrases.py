"""Which words already mean something to a model: phrases ranked by how well they tell bad completions from good ones.

Completions are sampled from the plain model and scored. A phrase before the prompt changes the likelihood of each:

    shift(y)  =  log p(y | phrase, x)  -  log p(y | x)

If the phrase stands for the unwanted, bad completions are shifted upwards more than others. The AUC says how often: the
share of pairs of a bad and another completion in which the bad one has the larger shift. At 0.5 a phrase says nothing.
Well above, it suits the worst quantile, and well below, the best one. Nothing is trained.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.perplexity import completion_nll
from quarkrl.models.conditioning import Conditioning, start_ids_of
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.strategy import Sampling

BAD_SHARE = 0.2  # The worst fifth of the completions is bad, as the worst of five quantiles is.


@dataclass(frozen=True)
class RankedPhrase:
    """A phrase and what it tells.

    Attributes:
        text: the phrase.
        tokens: its length in tokens.
        auc: the share of pairs that it orders rightly.
        margin: half of the 95 % interval of the AUC (Hanley and McNeil 1982).
    """

    text: str
    tokens: int
    auc: float
    margin: float


@dataclass(frozen=True)
class ScoredSamples:
    """Completions of the plain model, with their rewards.

    Attributes:
        prompt_ids, completion_ids: token ids, n each.
        rewards: `(n,)`.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    rewards: np.ndarray

    @property
    def is_bad(self) -> np.ndarray:
        """`(n,)` bool: whether a completion is among the worst fifth. Those with equal rewards are on one side.

        Raises:
            UserError: all rewards are equal.
        """
        worst = self.rewards <= np.quantile(self.rewards, BAD_SHARE)
        if worst.all():  # More than four fifths share the lowest reward: the others are good.
            worst = self.rewards < self.rewards.max()
        if not worst.any():
            raise UserError(
                f"reward {self.rewards[0]:g}: must differ between completions, and all {len(worst)} have this one. "
                "Sample more completions, or take prompts on which the model fails."
            )
        return worst


def sample_and_score(
    generator: QuarkGenerator,
    prompts: Prompts,
    scorer: Scorer,
    sampling: Sampling,
    *,
    samples_per_prompt: int,
    seed: int,
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScoredSamples:
    """Sample completions of the prompts, which have ids, and score them. Those without a reward are left out.

    Raises:
        UserError: a reward fails.
    """
    rows = [row for row in range(len(prompts)) for _ in range(samples_per_prompt)]
    prompt_ids, done = [prompts.ids[row] for row in rows], 0

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, len(rows))

    completions = generator.complete(prompt_ids, sampling, seed=seed, batch_size=batch_size, on_batch=on_batch)
    columns: dict[str, list[Any]] = {name: [values[row] for row in rows] for name, values in prompts.columns.items()}
    texts = generator.decode(prompt_ids, completions)
    scores = scorer([prompts.prompts[row] for row in rows], texts, completions, columns, generator.end_ids)
    rewards = scores.rewards[:, 0]
    scored = np.flatnonzero(np.isfinite(rewards))
    return ScoredSamples([prompt_ids[i] for i in scored], [completions[i] for i in scored], rewards[scored])


def rank_phrases(
    generator: QuarkGenerator,
    samples: ScoredSamples,
    phrases: Sequence[str],
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[RankedPhrase]:
    """Rank phrases by AUC, the highest first.

    Args:
        generator: the plain model.
        samples: its completions.
        phrases: texts that are put before the prompts.
        batch_size: completions per batch.
        on_progress: called with the number of finished phrases and of all.

    Raises:
        UserError: all rewards are equal, or a phrase has no tokens.
    """
    is_bad, plain = samples.is_bad, _log_likelihood(generator, samples, [], batch_size)
    ranked = []
    for done, text in enumerate(phrases):
        ids = generator.tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise UserError(f"words {text!r}: must have at least one token. Leave the text out.")
        shift = _log_likelihood(generator, samples, ids, batch_size) - plain
        auc, margin = area_under_curve(shift, is_bad)
        ranked.append(RankedPhrase(text, len(ids), auc, margin))
        on_progress(done + 1, len(phrases))
    return sorted(ranked, key=lambda phrase: -phrase.auc)


def _log_likelihood(generator: QuarkGenerator, samples: ScoredSamples, phrase: Sequence[int], size: int) -> np.ndarray:
    """The log-likelihood of each completion behind the phrase and its prompt."""
    start_ids = start_ids_of(generator.tokenizer)  # As in a run, a phrase follows BOS.
    words = Conditioning(("words",), ((tuple(phrase),),), start_ids, generator.vocab_size, "text")
    prompts = [words.prefix(ids, (0,)) for ids in samples.prompt_ids]
    nll = completion_nll(generator.model, prompts, samples.completion_ids, generator.vocab_size, size)
    return -np.array(nll)


def area_under_curve(values: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve, and half of its 95 % interval (Hanley and McNeil 1982).

    Args:
        values: `(n,)`; larger values should be positive.
        positive: `(n,)` bool; some are, and some are not.
    """
    order = np.argsort(values, kind="stable")
    _, first, counts = np.unique(values[order], return_index=True, return_counts=True)
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(first + (counts + 1) / 2, counts)  # Equal values share the mean of their ranks.
    m, n = int(positive.sum()), int((~positive).sum())
    auc = float((ranks[positive].sum() - m * (m + 1) / 2) / (m * n))
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (m - 1) * (q1 - auc**2) + (n - 1) * (q2 - auc**2)) / (m * n)
    return auc, 1.96 * math.sqrt(max(variance, 0.0))
