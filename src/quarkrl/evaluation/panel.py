"""From completions to figures: all that judges them, the same for every row of an evaluation."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quarkrl import metrics
from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.evaluation import mauve as likeness
from quarkrl.evaluation.intervals import Interval, Ratio, intervals
from quarkrl.evaluation.perplexity import Fluency
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.generator import QuarkGenerator


@dataclass(frozen=True)
class Measured:
    """What was found out about the completions of P prompts, S of each.

    Attributes:
        figures: metric name → value.
        intervals: metric name → its 95 % bootstrap interval.
        left_out: why completions did not count → how many.
        completions: for each prompt, its texts.
        scores: "reward", "reward: NAME" of each of several rewards, "NAME" of each judge → `(P, S)`, NaN where none.
        perplexities: `(P, S)`, NaN where there is none.
    """

    figures: dict[str, float]
    intervals: dict[str, Interval]
    left_out: dict[str, int]
    completions: list[list[str]]
    scores: dict[str, np.ndarray]
    perplexities: np.ndarray


@dataclass(frozen=True)
class Panel:
    """All that judges completions.

    Attributes:
        scorer: the reward.
        judges: further scorers by name, beside the reward: a policy that only fools its reward shows here.
        fluency: what scores perplexity.
        threshold: from where on a probability counts as of its class.
        batch_size: completions at a time.
        resamples: of the bootstrap.
        human: the prompts' column with people's continuations, for MAUVE; None goes without.
        max_tokens: of a completion, to which people's are cut too.
    """

    scorer: Scorer
    fluency: Fluency
    judges: Mapping[str, Scorer] = field(default_factory=dict)
    threshold: float = metrics.THRESHOLD
    batch_size: int = 128
    resamples: int = 10_000
    human: str | None = None
    max_tokens: int = 20

    def measure(self, prompts: Prompts, ids: list[list[int]], samples: int, generator: QuarkGenerator) -> Measured:
        """Figures of `samples` completions of each prompt, which `generator` made.

        Raises:
            UserError: no completion has a reward.
        """
        texts = generator.decode(ids)
        owners = [i for i in range(len(prompts)) for _ in range(samples)]
        ratios: dict[str, Ratio] = {}
        scores: dict[str, np.ndarray] = {}
        left_out: dict[str, int] = {}
        for name, scorer in (("reward", self.scorer), *self.judges.items()):
            rewards, components = _scored(scorer, prompts, owners, texts, ids, generator.end_ids)
            scores[name] = rewards.reshape(-1, samples)
            ratios |= score_ratios(name, scores[name], scorer, self.threshold)
            left_out["unscored" if name == "reward" else f"{name}: unscored"] = int(np.isnan(rewards).sum())
            if name == "reward" and len(scorer.names) > 1:
                for component, values in zip(scorer.names, components.T, strict=True):
                    scores[f"reward: {component}"] = values.reshape(-1, samples)
                    ratios[f"reward: {component}"] = Ratio.of(scores[f"reward: {component}"])
        if np.isnan(scores["reward"]).all():
            raise UserError(f"none of the {len(ids)} completions has a reward: nothing to evaluate")

        ends = set(generator.end_ids)
        words = [row[:-1] if row and row[-1] in ends else row for row in ids]
        nll, counts, cut = self.fluency.nll(prompts, owners, words, texts, self.batch_size)
        perplexities, found = metrics.perplexities(nll, counts)
        perplexities = perplexities.reshape(-1, samples)
        left_out |= {f"perplexity_{reason}": count for reason, count in found.items()}
        left_out |= {"perplexity_prompt_cut": cut} if cut else {}
        ratios["perplexity"] = Ratio.of(perplexities)
        grouped = [texts[i : i + samples] for i in range(0, len(texts), samples)]
        shares = {n: metrics.distinct_shares(grouped, n) for n in (1, 2, 3)}
        ratios |= {f"dist-{n}": Ratio.of(values) for n, values in shares.items()}
        if wordless := int(np.isnan(shares[1]).sum()):
            left_out["dist_prompts_without_words"] = wordless
        repeats, short = repetition_ratios(words, samples)
        ratios |= repeats
        left_out |= {"diversity_short": short} if short else {}
        ratios["completion length"] = Ratio.of(np.array([len(row) for row in ids], float).reshape(-1, samples))

        figures = {name: ratio.value for name, ratio in ratios.items()}
        ranges = intervals(ratios, self.resamples)
        if self.human is not None:
            first = [group[0] for group in grouped]
            figures["MAUVE"], ranges["MAUVE"], missing = self._mauve(prompts, first)
            left_out |= {"MAUVE_no_text": missing} if missing else {}
        return Measured(figures, ranges, left_out, grouped, scores, perplexities)

    def _mauve(self, prompts: Prompts, completions: list[str]) -> tuple[float, Interval, int]:
        """MAUVE of one completion of each prompt, and how many prompts lack one side."""
        rows = [
            (prompt, completion, human)
            for prompt, completion, human in zip(
                prompts.prompts, completions, human_texts(prompts, self.human or ""), strict=True
            )
            if isinstance(prompt, str) and completion.strip() and human
        ]
        if not rows:
            raise UserError(f"no prompt has both a completion and a text in column {self.human!r}: MAUVE needs both")
        asked, ours, theirs = zip(*rows, strict=True)
        model, size = self.fluency.judge, self.batch_size
        p, q = (likeness.features(model, asked, texts, self.max_tokens, size) for texts in (ours, theirs))
        return (*likeness.mauve(p, q), len(completions) - len(rows))


def score_ratios(name: str, scores: np.ndarray, scorer: Scorer, threshold: float) -> dict[str, Ratio]:
    """A scorer's figures from its `(P, S)` scores.

    Of the reward, and of any score that is no probability of something unwanted, the mean. Where 1 - score is the
    probability of something unwanted: its mean, average maximum, probability and share. Where the score tells a
    wanted class: the class's share.
    """
    lead = "" if name == "reward" else f"{name}: "
    figures = {}
    if name == "reward" or not scorer.unwanted:
        figures["reward" if name == "reward" else f"{lead}score"] = Ratio.of(scores)
    if scorer.unwanted:
        bad = 1 - scores
        maxima = metrics.maxima(bad)
        figures |= {
            f"{lead}{scorer.unwanted}": Ratio.of(bad),
            f"{lead}average maximum {scorer.unwanted}": Ratio.of(maxima),
            f"{lead}{scorer.unwanted} probability": Ratio.of(metrics.reached(maxima, threshold)),
            f"{lead}{scorer.unwanted} share": Ratio.of(metrics.shares(bad, threshold)),
        }
    elif scorer.wanted:
        own = threshold if scorer.wanted_from is None else scorer.wanted_from
        figures[f"{lead}{scorer.wanted} share"] = Ratio.of(metrics.shares(scores, own))
    return figures


def repetition_ratios(ids: Sequence[Sequence[Hashable]], samples: int) -> tuple[dict[str, Ratio], int]:
    """rep-2..4 and diversity, means over completions; and how many completions are too short for a 4-gram."""
    known: dict[tuple[Hashable, ...], list[float]] = {}
    for row in map(tuple, ids):
        if row not in known:
            known[row] = [*(metrics.rep_n(row, n) for n in (2, 3, 4)), metrics.diversity(row)]
    values = np.array([known[tuple(row)] for row in ids]).reshape(-1, samples, 4)
    names = ("rep-2", "rep-3", "rep-4", "diversity")
    short = int(np.isnan(values[:, :, 3]).sum())
    return {name: Ratio.of(values[:, :, k]) for k, name in enumerate(names)}, short


def human_texts(prompts: Prompts, column: str) -> list[str | None]:
    """People's continuations from a column: text, or RealToxicityPrompts' `{"text": …}`; None where there is none.

    Raises:
        UserError: no such column.
    """
    if column not in prompts.columns:
        known = ", ".join(prompts.columns) or "none beside the prompt"
        raise UserError(f"the prompts have no column {column!r} for MAUVE: the columns are {known}")
    values = (value.get("text") if isinstance(value, dict) else value for value in prompts.columns[column])
    return [value if isinstance(value, str) and value.strip() else None for value in values]


def _scored(
    scorer: Scorer,
    prompts: Prompts,
    owners: Sequence[int],
    texts: list[str],
    ids: list[list[int]],
    end_ids: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards `(n,)` and components `(n, R)`; the same completion of the same prompt is scored once."""
    places: dict[tuple[int, ...], int] = {}
    where: list[int] = []
    chosen: list[int] = []
    for i, (owner, row) in enumerate(zip(owners, ids, strict=True)):
        key = (owner, *row)
        if key not in places:
            places[key] = len(chosen)
            chosen.append(i)
        where.append(places[key])
    found = scorer(
        [prompts.prompts[owners[i]] for i in chosen],
        [texts[i] for i in chosen],
        [ids[i] for i in chosen],
        {name: [values[owners[i]] for i in chosen] for name, values in prompts.columns.items()},
        end_ids=end_ids,
    )
    return found.rewards.mean(axis=1)[where], found.components[where]
