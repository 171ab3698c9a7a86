"""From completions to figures: the reward, the judges, perplexity, diversity and MAUVE, the same for every row."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from quarkrl import metrics
from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.intervals import Interval, Ratio, intervals
from quarkrl.evaluation.mauve import mauve, text_features
from quarkrl.evaluation.options import RESAMPLES
from quarkrl.evaluation.perplexity import PerplexityModel
from quarkrl.evaluation.results import Measurement
from quarkrl.rewards.scorer import Scorer

# The figures of `diversity_ratios`.
_TEXT_METRICS = ("dist-1", "dist-2", "dist-3", "rep-2", "rep-3", "rep-4", "diversity", "completion length")


@dataclass(frozen=True)
class Completions:
    """S completions of each of P prompts, in the order of the prompts.

    Attributes:
        prompts: the P prompts.
        ids: P · S lists of token ids, EOS included.
        texts: the same as text.
        end_ids: the EOS ids.
    """

    prompts: Prompts
    ids: list[list[int]]
    texts: list[str]
    end_ids: Sequence[int]

    @property
    def samples(self) -> int:
        """S: completions per prompt."""
        return len(self.ids) // len(self.prompts)

    @cached_property
    def prompt_numbers(self) -> list[int]:
        """For each completion, the index of its prompt."""
        return [i for i in range(len(self.prompts)) for _ in range(self.samples)]

    @cached_property
    def ids_without_eos(self) -> list[list[int]]:
        """The token ids of each completion, without the EOS that ends it."""
        ends = set(self.end_ids)
        return [row[:-1] if row and row[-1] in ends else row for row in self.ids]

    @cached_property
    def texts_by_prompt(self) -> list[list[str]]:
        """For each prompt, its S texts."""
        return [self.texts[i : i + self.samples] for i in range(0, len(self.texts), self.samples)]

    def by_prompt(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """One value per completion, as `(P, S)`."""
        return np.asarray(values).reshape(-1, self.samples)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The scorers and models that judge completions.

    Attributes:
        scorer: the reward.
        perplexity_model: computes perplexity and MAUVE's features.
        judges: further scorers by name, which show whether a policy only exploits its reward.
        threshold: the probability from which a text counts as a member of a class.
        batch_size: completions per batch.
        resamples: number of bootstrap resamples.
        human_column: the prompts' column with human continuations, for MAUVE; None for no MAUVE.
        max_tokens: maximum completion length; MAUVE truncates both sides to it.
    """

    scorer: Scorer
    perplexity_model: PerplexityModel
    judges: Mapping[str, Scorer] = field(default_factory=dict)
    threshold: float = metrics.THRESHOLD
    batch_size: int = 128
    resamples: int = RESAMPLES
    human_column: str | None = None
    max_tokens: int = 20

    @property
    def metric_names(self) -> list[str]:
        """The names of the figures of `measure`, in its order."""
        names: list[str] = []
        for name, scorer in (("reward", self.scorer), *self.judges.items()):
            names += score_ratios(name, np.zeros((1, 1)), scorer, self.threshold)
            if name == "reward" and len(scorer.names) > 1:
                names += [f"reward: {component}" for component in scorer.names]
        return [*names, "perplexity", *_TEXT_METRICS, *(["MAUVE"] if self.human_column is not None else [])]

    def measure(self, completions: Completions) -> Measurement:
        """Compute all figures of the completions, with their confidence intervals.

        Raises:
            UserError: no completion has a reward.
        """
        scores, score_ratios, left_out = self._score(completions)
        perplexities, perplexity_left_out, truncated = self._perplexities(completions)
        text_ratios, text_left_out = diversity_ratios(completions)
        ratios = score_ratios | {"perplexity": Ratio.of(perplexities)} | text_ratios
        left_out |= perplexity_left_out | text_left_out
        figures = {name: ratio.value for name, ratio in ratios.items()}
        ranges = intervals(ratios, self.resamples)
        if self.human_column is not None:
            figures["MAUVE"], ranges["MAUVE"], skipped = self._mauve(completions, self.human_column)
            left_out |= {"MAUVE_no_text": skipped} if skipped else {}
        return Measurement(
            figures=figures,
            intervals=ranges,
            left_out=left_out,
            truncated=truncated,
            scores=scores,
            perplexities=perplexities,
        )

    def _score(self, completions: Completions) -> tuple[dict[str, np.ndarray], dict[str, Ratio], dict[str, int]]:
        """Scores of the reward and of each judge, their figures as ratios, and the numbers of missing scores."""
        scores: dict[str, np.ndarray] = {}
        ratios: dict[str, Ratio] = {}
        left_out: dict[str, int] = {}
        for name, scorer in (("reward", self.scorer), *self.judges.items()):
            rewards, components = _score_distinct(scorer, completions)
            scores[name] = completions.by_prompt(rewards)
            ratios |= score_ratios(name, scores[name], scorer, self.threshold)
            left_out["unscored" if name == "reward" else f"{name}: unscored"] = int(np.isnan(rewards).sum())
            if name == "reward" and len(scorer.names) > 1:
                for component, values in zip(scorer.names, components.T, strict=True):
                    scores[f"reward: {component}"] = completions.by_prompt(values)
                    ratios[f"reward: {component}"] = Ratio.of(scores[f"reward: {component}"])
        if np.isnan(scores["reward"]).all():
            raise UserError(
                f"none of the {len(completions.ids)} completions has a reward. Check the reward function on some texts."
            )
        return scores, ratios, left_out

    def _perplexities(self, completions: Completions) -> tuple[np.ndarray, dict[str, int], int]:
        """`(P, S)` perplexities, the numbers of missing ones, and the number of those with a truncated prompt."""
        nll_sums, token_counts, truncated = self.perplexity_model.nll(
            completions.prompts,
            completions.prompt_numbers,
            completions.ids_without_eos,
            completions.texts,
            self.batch_size,
        )
        perplexities, counts = metrics.perplexities(nll_sums, token_counts)
        left_out = {f"perplexity_{reason}": count for reason, count in counts.items()}
        return completions.by_prompt(perplexities), left_out, truncated

    def _mauve(self, completions: Completions, column: str) -> tuple[float, Interval, int]:
        """MAUVE of each prompt's first completion, its interval, and the number of prompts without either text."""
        prompts = completions.prompts
        candidates = zip(prompts.prompts, completions.texts_by_prompt, human_texts(prompts, column), strict=True)
        triples = [
            (prompt, texts[0], human)
            for prompt, texts, human in candidates
            if isinstance(prompt, str) and texts[0].strip() and human
        ]
        if not triples:
            raise UserError(
                f"human_column {column!r}: no prompt has both a completion and a human text. MAUVE compares the two."
            )
        heads, model_texts, people_texts = zip(*triples, strict=True)
        model_features, human_features = (
            text_features(self.perplexity_model.generator, heads, texts, self.max_tokens, self.batch_size)
            for texts in (model_texts, people_texts)
        )
        return (*mauve(model_features, human_features), len(prompts) - len(triples))


def score_ratios(name: str, scores: np.ndarray, scorer: Scorer, threshold: float) -> dict[str, Ratio]:
    """Return a scorer's figures, as ratios, from its `(P, S)` scores.

    The mean score, unless a judge measures something unwanted. If 1 - score is the probability of something unwanted:
    its mean, average maximum, probability and share. If the score indicates a wanted class: that class's share.
    """
    prefix = "" if name == "reward" else f"{name}: "
    ratios = {}
    if name == "reward" or not scorer.unwanted:
        ratios["reward" if name == "reward" else f"{prefix}score"] = Ratio.of(scores)
    if scorer.unwanted:
        unwanted = 1 - scores
        maxima = metrics.maxima(unwanted)
        ratios |= {
            f"{prefix}{scorer.unwanted}": Ratio.of(unwanted),
            f"{prefix}average maximum {scorer.unwanted}": Ratio.of(maxima),
            f"{prefix}{scorer.unwanted} probability": Ratio.of(metrics.reached(maxima, threshold)),
            f"{prefix}{scorer.unwanted} share": Ratio.of(metrics.shares(unwanted, threshold)),
        }
    elif scorer.wanted:
        class_threshold = threshold if scorer.wanted_from is None else scorer.wanted_from
        ratios[f"{prefix}{scorer.wanted} share"] = Ratio.of(metrics.shares(scores, class_threshold))
    return ratios


def diversity_ratios(completions: Completions) -> tuple[dict[str, Ratio], dict[str, int]]:
    """Return dist-n, rep-n, diversity and completion length, as ratios, and the numbers of texts without them."""
    shares = {n: metrics.distinct_shares(completions.texts_by_prompt, n) for n in (1, 2, 3)}
    ratios = {f"dist-{n}": Ratio.of(values) for n, values in shares.items()}
    left_out = {}
    if without_words := int(np.isnan(shares[1]).sum()):
        left_out["dist_prompts_without_words"] = without_words
    repetition, too_short = repetition_ratios(completions.ids_without_eos, completions.samples)
    ratios |= repetition
    if too_short:
        left_out["diversity_short"] = too_short
    lengths = np.array([len(row) for row in completions.ids], float)
    ratios["completion length"] = Ratio.of(completions.by_prompt(lengths))
    return ratios, left_out


def repetition_ratios(ids: Sequence[Sequence[Hashable]], samples: int) -> tuple[dict[str, Ratio], int]:
    """Return rep-2, rep-3, rep-4 and diversity, as means over completions, and the number without a 4-gram."""
    values_of: dict[tuple[Hashable, ...], list[float]] = {}
    for row in map(tuple, ids):
        if row not in values_of:
            values_of[row] = [*(metrics.rep_n(row, n) for n in (2, 3, 4)), metrics.diversity(row)]
    values = np.array([values_of[tuple(row)] for row in ids]).reshape(-1, samples, 4)
    names = ("rep-2", "rep-3", "rep-4", "diversity")
    too_short = int(np.isnan(values[:, :, 3]).sum())
    return {name: Ratio.of(values[:, :, k]) for k, name in enumerate(names)}, too_short


def human_texts(prompts: Prompts, column: str) -> list[str | None]:
    """Return the human continuation of each prompt from a column of text or `{"text": …}`; None if there is none.

    Raises:
        UserError: the prompts do not have the column.
    """
    if column not in prompts.columns:
        columns = ", ".join(prompts.columns) or "none"
        raise UserError(f"human_column {column!r}: must be a column of the prompts. Their columns are: {columns}.")
    values = (value.get("text") if isinstance(value, dict) else value for value in prompts.columns[column])
    return [value if isinstance(value, str) and value.strip() else None for value in values]


def _score_distinct(scorer: Scorer, completions: Completions) -> tuple[np.ndarray, np.ndarray]:
    """Rewards `(n,)` and components `(n, R)`; a repeated completion of the same prompt is scored once."""
    places: dict[tuple[int, ...], int] = {}  # prompt and token ids → row among the distinct completions
    rows: list[int] = []  # of each completion, its row among the distinct ones
    first: list[int] = []  # of each distinct completion, its first index
    for i, (number, ids) in enumerate(zip(completions.prompt_numbers, completions.ids, strict=True)):
        key = (number, *ids)
        if key not in places:
            places[key] = len(first)
            first.append(i)
        rows.append(places[key])
    prompts, numbers = completions.prompts, [completions.prompt_numbers[i] for i in first]
    scores = scorer(
        [prompts.prompts[number] for number in numbers],
        [completions.texts[i] for i in first],
        [completions.ids[i] for i in first],
        {name: [values[number] for number in numbers] for name, values in prompts.columns.items()},
        end_ids=completions.end_ids,
    )
    return scores.rewards.mean(axis=1)[rows], scores.components[rows]
