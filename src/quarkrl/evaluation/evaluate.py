"""Evaluation: sample, score, measure; and the protocol beside the numbers, without which they mean nothing."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from quarkrl import metrics
from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.evaluation import results
from quarkrl.evaluation.corpus import CorpusRow, corpus_row
from quarkrl.evaluation.intervals import LEVEL, RESAMPLES, Interval
from quarkrl.evaluation.mauve import load_mauve
from quarkrl.evaluation.panel import Panel, human_texts
from quarkrl.evaluation.perplexity import Fluency, completion_nll, shares_tokens
from quarkrl.evaluation.provenance import model_source, surroundings, texts_read
from quarkrl.models.quark_json import reference_name
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.guidance import check_guidance_scale
from quarkrl.sampling.sampler import complete
from quarkrl.sampling.strategy import Sampling

__all__ = ["Evaluation", "Row", "completion_nll", "evaluate"]

Notify = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One line of an evaluation: a model, asked for one quantile, on one set of prompts.

    Attributes:
        name: "reference", "model", the quantile asked for, or "best γ=2" with guidance.
        figures: metric name → value; NaN where there is nothing to measure.
        left_out: why completions did not count → how many.
        completions: for each prompt, its texts.
        rewards: `(P, S)`, NaN where there is none.
        prompts_name: which set of prompts.
        quantile: its number; None for a plain model.
        guidance_scale: γ; 1 is without guidance.
        intervals: metric name → its 95 % bootstrap interval over prompts.
        scores: name of each scorer → `(P, S)`.
        perplexities: `(P, S)`, NaN where there is none.
    """

    name: str
    figures: dict[str, float]
    left_out: dict[str, int]
    completions: list[list[str]]
    rewards: np.ndarray
    prompts_name: str
    quantile: int | None
    guidance_scale: float
    intervals: dict[str, Interval]
    scores: dict[str, np.ndarray]
    perplexities: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """Rows to compare, and the protocol that produced them.

    Attributes:
        rows: for each set of prompts, the reference and what the model was asked for.
        protocol: all that the figures depend on.
        prompt_sets: the prompts that were used, by the sets' names.
        corpus: how well each model predicts the corpus, if one was given.
    """

    rows: list[Row]
    protocol: dict[str, Any]
    prompt_sets: dict[str, Prompts]
    corpus: list[CorpusRow] = field(default_factory=list)

    @property
    def prompts(self) -> Prompts:
        """The prompts of the first set, in domain."""
        return next(iter(self.prompt_sets.values()))

    def of(self, prompts_name: str) -> list[Row]:
        """The rows of one set of prompts."""
        return [row for row in self.rows if row.prompts_name == prompts_name]

    def save(self, path: str | os.PathLike) -> None:
        """Write figures and protocol as JSON, and the completions with their scores as Parquet beside it.

        Raises:
            UserError: `path` is a directory, or ends in .parquet.
        """
        results.save(self, path)


@dataclass(frozen=True)
class _Asked:
    """Whom to ask for what: a row of each set of prompts."""

    name: str
    generator: QuarkGenerator
    quantile: str | int
    guidance_scale: float = 1.0

    @property
    def number(self) -> int | None:
        conditioning = self.generator.conditioning
        return conditioning.quantiles_of(self.quantile)[0] if conditioning else None


@dataclass(frozen=True)
class _Draw:
    """How completions are drawn, the same for every row."""

    sampling: Sampling
    samples: int
    seed: int
    batch_size: int
    guidance_from: str | int
    notify: Notify

    def completions(self, asked: _Asked, prompts: Prompts, title: str) -> list[list[int]]:
        """Token ids, those of one prompt side by side."""
        generator = asked.generator
        plain = [ids for ids in prompts.ids for _ in range(self.samples)]
        done = 0

        def on_batch(count: int) -> None:
            nonlocal done
            done += count
            self.notify(title, done, len(plain))

        contrast = None
        if asked.guidance_scale != 1:
            contrast = generator.contrast(plain, asked.guidance_scale, self.guidance_from)
        return complete(
            generator.model,
            [generator.condition(ids, asked.quantile) for ids in plain],
            self.sampling,
            end_ids=generator.end_ids,
            vocab_size=generator.vocab_size,
            seed=self.seed,
            batch_size=self.batch_size,
            on_batch=on_batch,
            contrast=contrast,
        )


def evaluate(
    model: str | os.PathLike,
    prompts: Prompts | Mapping[str, Prompts],
    scorer: Scorer,
    *,
    reference: str | os.PathLike | None = None,
    quantiles: Sequence[str | int] = ("best", "worst"),
    guidance_scales: Sequence[float] = (),
    guidance_from: str | int = "worst",
    sampling: Sampling | None = None,
    samples: int = 25,
    seed: int = 0,
    batch_size: int = 128,
    judges: Sequence[Scorer] = (),
    threshold: float = metrics.THRESHOLD,
    perplexity_model: str | os.PathLike | None = None,
    human_column: str | None = None,
    corpus: Prompts | None = None,
    skip_bad: bool = False,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    resamples: int = RESAMPLES,
    notify: Notify = lambda row, done, total: None,
) -> Evaluation:
    """Measure a model beside its reference on the same prompts.

    Args:
        model: a model that Quark trained, or any causal language model (which then has one row, "model").
        prompts: what to continue; several sets by name, such as in domain and out of domain.
        scorer: the reward; one that is 1 - something unwanted gives that thing's metrics too.
        reference: the model before training. By default what `model` was trained from.
        quantiles: which quantiles of `model` to ask for, a row each; ["all"] for every one, worst first.
        guidance_scales: γ to try on the best quantile, a row each; 1 is without guidance.
        guidance_from: what guidance goes away from: a quantile, or "reference".
        sampling: how to decode; nucleus 0.9 and 20 tokens by default.
        samples: completions for each prompt, S; greedy decoding has only one to give.
        seed: the same gives the same completions.
        batch_size: completions sampled at a time.
        judges: further scorers to report beside the reward.
        threshold: from where on a probability counts as of its class (at least, not more than).
        perplexity_model: what scores perplexity and finds MAUVE's features, with any tokenizer; the reference by
            default, `model` where there is none.
        human_column: the prompts' column with people's continuations; gives MAUVE.
        corpus: texts that people wrote, for rep, wrep, token accuracy and perplexity.
        skip_bad: leave out prompts that are too long, and count them, instead of raising.
        dtype: what the models compute in, such as "bfloat16"; float32 by default.
        trust_remote_code: run the Python code that comes with any of the models.
        resamples: of the bootstrap.
        notify: called with a row's name and how many of its completions are done.

    Raises:
        UserError: the reference cannot be loaded, a quantile does not exist, a prompt is too long.
    """
    sampling = sampling or Sampling()
    samples = samples if sampling.do_sample else 1
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options |= {} if dtype is None else {"dtype": dtype}
    policy = QuarkGenerator.from_pretrained(model, **options)
    reference = _reference(model, reference)
    base = _load_reference(reference, model, policy, options) if reference else None
    if base:
        policy.reference = base.model  # what guidance may go away from: the same, not a second copy
    if perplexity_model is None or str(perplexity_model) == str(reference):
        perplexity_model, judge = reference or model, base or policy
    else:
        judge = QuarkGenerator.from_pretrained(perplexity_model, **options)
    asked = _asked(policy, base, quantiles, guidance_scales, guidance_from)
    sets = dict(prompts) if isinstance(prompts, Mapping) else {"prompts": prompts}
    sets = {name: _encoded(given, policy, sampling.max_new_tokens, skip_bad) for name, given in sets.items()}
    read = _encoded(corpus, policy, None, skip_bad) if corpus else None
    if human_column is not None:  # Before anything is sampled.
        load_mauve()
        for encoded in sets.values():
            human_texts(encoded, human_column)

    named = _named(judges)
    fluency = Fluency(judge, policy)
    panel = Panel(scorer, fluency, named, threshold, batch_size, resamples, human_column, sampling.max_new_tokens)
    draw = _Draw(sampling, samples, seed, batch_size, guidance_from, notify)
    rows = []
    for set_name, encoded in sets.items():
        for each in asked:
            ids = draw.completions(each, encoded, each.name if len(sets) == 1 else f"{set_name}: {each.name}")
            rows.append(_row(each, set_name, encoded, ids, samples, panel))
    corpus_rows = [
        corpus_row(each.name, each.generator, read.ids, each.quantile, batch_size, resamples)
        for each in asked
        if read and each.guidance_scale == 1
    ]
    protocol = {
        "model": str(model),
        "reference": None if reference is None else str(reference),
        "perplexity_model": str(perplexity_model),
        "weights": [
            model_source(name, generator.model)
            for name, generator in {str(model): policy, str(reference): base, str(perplexity_model): judge}.items()
            if generator
        ],
        "prompts": {name: texts_read(each) for name, each in sets.items()},
        "samples_per_prompt": samples,
        "batch_size": batch_size,
        "sampling": asdict(sampling),
        "seed": seed,
        "guidance_from": str(guidance_from) if guidance_scales else None,
        "rewards": scorer.identity,
        "judges": {name: each.identity for name, each in named.items()},
        "perplexity": "exp(mean token NLL) per completion given its prompt, without EOS; >= 1e4 dropped; mean"
        + ("" if fluency.same_tokens else "; text tokenised anew by the perplexity model"),
        "threshold": threshold,
        "human_column": human_column,
        "corpus": read and texts_read(read),
        "intervals": {"level": LEVEL, "method": "percentile bootstrap over prompts", "resamples": resamples, "seed": 0},
        **surroundings(policy.model.device),
    }
    return Evaluation(rows, protocol, sets, corpus_rows)


def _reference(model: str | os.PathLike, reference: str | os.PathLike | None) -> str | os.PathLike | None:
    if reference is None:
        return reference_name(model)
    return None if str(reference) == "none" else reference


def _load_reference(
    reference: str | os.PathLike, model: str | os.PathLike, policy: QuarkGenerator, options: dict[str, Any]
) -> QuarkGenerator:
    try:
        base = QuarkGenerator.from_pretrained(reference, **options)
    except UserError as error:
        raise UserError(
            f"the reference of {model} is {str(reference)!r}, which cannot be loaded ({error}); "
            "give --reference PATH, or --reference none to go without"
        ) from error
    if not shares_tokens(base, policy):
        raise UserError(
            f"the reference {str(reference)!r} has other tokens than {model}: want the model before training, "
            "or --reference none; a model with any tokenizer can be the perplexity model"
        )
    return base


def _asked(
    policy: QuarkGenerator,
    base: QuarkGenerator | None,
    quantiles: Sequence[str | int],
    guidance_scales: Sequence[float],
    guidance_from: str | int,
) -> list[_Asked]:
    """The rows to come; what does not exist stops here, before any sampling."""
    asked = [_Asked("reference", base, "best")] if base else []
    if policy.conditioning is None:
        if any(check_guidance_scale(scale) != 1 for scale in guidance_scales):
            raise UserError(
                "guidance_scales: this model was not trained by Quark and has no quantiles to guide between"
            )
        return [*asked, _Asked("model", policy, "best")]
    if list(map(str, quantiles)) == ["all"]:
        quantiles = range(policy.conditioning.num_quantiles)
    asked += [_Asked(str(quantile), policy, quantile) for quantile in quantiles]
    known = {(each.number, 1.0) for each in asked if each.generator is policy}
    for scale in guidance_scales:
        each = _Asked("best" if check_guidance_scale(scale) == 1 else f"best γ={scale:g}", policy, "best", float(scale))
        if (each.number, each.guidance_scale) not in known:
            asked.append(each)
    if guidance_scales:
        policy.contrast([], guidance_scales[0], guidance_from)
        policy.condition([], "best" if guidance_from == "reference" else guidance_from)
    for each in asked:
        each.generator.condition([], each.quantile)
    return asked


def _encoded(prompts: Prompts, policy: QuarkGenerator, new_tokens: int | None, skip_bad: bool) -> Prompts:
    """The prompts with their plain token ids; None for `new_tokens` sets no limit to their length."""
    room = 2**31 if new_tokens is None else policy.context_length - new_tokens
    encoded = prompts.encode(policy.tokenizer, max_length=room, skip_bad=skip_bad)
    if not policy.conditioning:
        return encoded
    # The tokenizer of a trained model puts the best reward tokens first, and so left room for them.
    return replace(encoded, ids=[policy.conditioning.strip(ids) for ids in encoded.ids])


def _row(asked: _Asked, set_name: str, prompts: Prompts, ids: list[list[int]], samples: int, panel: Panel) -> Row:
    try:
        found = panel.measure(prompts, ids, samples, asked.generator)
    except UserError as error:
        raise UserError(f"{asked.name}: {error}") from error
    return Row(
        name=asked.name,
        figures=found.figures,
        left_out=found.left_out,
        completions=found.completions,
        rewards=found.scores["reward"],
        prompts_name=set_name,
        quantile=asked.number,
        guidance_scale=asked.guidance_scale,
        intervals=found.intervals,
        scores=found.scores,
        perplexities=found.perplexities,
    )


def _named(judges: Sequence[Scorer]) -> dict[str, Scorer]:
    """The judges by name, a second of one name numbered."""
    named: dict[str, Scorer] = {}
    for judge in judges:
        name = base = "+".join(judge.names)
        number = 1
        while name in named or name == "reward":
            number += 1
            name = f"{base}-{number}"
        named[name] = judge
    return named
