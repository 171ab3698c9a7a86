"""Evaluate a model: sample completions, score them, and compare the figures with those of its reference.

    options = EvaluationOptions(samples=25, quantiles=("all",))
    evaluation = evaluate("run/final", {"in-domain": prompts}, scorer, options)
    evaluation.save("results.json")

The protocol in the result records the settings that the figures depend on.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from quarkrl.builtin import locate_model
from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.corpus import corpus_row
from quarkrl.evaluation.intervals import LEVEL, SEED
from quarkrl.evaluation.mauve import load_mauve
from quarkrl.evaluation.options import ALL_QUANTILES, NO_REFERENCE, EvaluationOptions
from quarkrl.evaluation.panel import Completions, Panel, human_texts
from quarkrl.evaluation.perplexity import PerplexityModel
from quarkrl.evaluation.provenance import environment, model_provenance, prompts_provenance
from quarkrl.evaluation.results import Evaluation, Row, curves, no_curve
from quarkrl.evaluation.target import SCALES, Target, search
from quarkrl.models.quark_json import keeps_special_tokens, reference_name
from quarkrl.names import unique_names
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.generator import STEERING, QuarkGenerator, has_same_vocabulary
from quarkrl.sampling.guidance import Contrast
from quarkrl.sampling.options import GuidanceScale, read_scale

Notify = Callable[[str, int, int], None]

_NO_LIMIT = 2**31


@dataclass(frozen=True)
class _Models:
    """The models of an evaluation, and the names or directories that they were loaded from."""

    policy: QuarkGenerator
    policy_name: str
    reference: QuarkGenerator | None
    reference_name: str | None
    perplexity: QuarkGenerator
    perplexity_name: str


@dataclass(frozen=True)
class _Variant:
    """A model with a requested quantile and a guidance scale: one row for each set of prompts."""

    name: str
    generator: QuarkGenerator
    requested: str | int
    scale: GuidanceScale = 1.0

    @property
    def guidance_scale(self) -> float:
        """γ; NaN if each attribute has its own."""
        return math.nan if isinstance(self.scale, str) else self.scale

    def contrast(self, plain_ids: Sequence[Sequence[int]], options: EvaluationOptions) -> Contrast | None:
        """Return the contrast of guidance for prompts; None without guidance."""
        guidance_from, rule = options.guidance_from, options.guidance_rule
        return self.generator.contrast(plain_ids, self.scale, guidance_from, self.requested, rule)

    @property
    def quantile(self) -> int | None:
        """The number of the quantile; None without quantiles, and where those of several attributes differ."""
        conditioning = self.generator.guide.conditioning
        numbers = set(conditioning.quantiles_of(self.requested)) if conditioning else set()
        return numbers.pop() if len(numbers) == 1 else None


def evaluate(  # noqa: PLR0913 - one keyword per choice
    model: str | os.PathLike,
    prompts: Prompts | Mapping[str, Prompts],
    scorer: Scorer,
    options: EvaluationOptions | None = None,
    *,
    judges: Sequence[Scorer] = (),
    corpus: Prompts | None = None,
    needs_curve: bool = False,
    known_rows: Sequence[Row] = (),
    keep_special_tokens: bool | None = None,
    notify: Notify = lambda row, done, total: None,
) -> Evaluation:
    """Measure a model and its reference on the same prompts.

    Args:
        model: directory or hub name of a model trained with Quark, or of any causal language model, which has one
            row, "model".
        prompts: one set of prompts, or several by name, such as in-domain and out-of-domain.
        scorer: the reward. If it is 1 - the probability of something unwanted, the metrics of that are reported too.
        options: what to measure and how; by default `EvaluationOptions()`.
        judges: further scorers, reported beside the reward.
        corpus: human-written texts, for rep, wrep, token accuracy and perplexity.
        needs_curve: raise an error before sampling if the rows make no curve (`results.curves`), which a plot needs.
        known_rows: rows that an earlier evaluation has measured; a row of this name and set is not measured again.
        keep_special_tokens: whether scorers read special tokens; by default as in the model's training.
        notify: called after each batch with the row's name, the number of finished completions, and their total.

    Raises:
        UserError: the reference cannot be loaded, a quantile does not exist, a prompt is too long, or no completion
            has a reward.
    """
    options = options or EvaluationOptions()
    sampling = options.strategy()
    target = Target.parse(options.target) if options.target else None
    model = locate_model(model)
    models = _load_models(model, options)
    variants = _variants(models, options)
    if needs_curve and not curves(variants):
        raise no_curve()
    sets = dict(prompts) if isinstance(prompts, Mapping) else {"prompts": prompts}
    prompt_limit = models.policy.longest_prompt(sampling.max_new_tokens)
    sets = {name: _encode(texts, models.policy, prompt_limit, options) for name, texts in sets.items()}
    _check_decoder_only(models, "corpus" if corpus else "human_column" if options.human_column else None)
    corpus = _encode(corpus, models.policy, _NO_LIMIT, options) if corpus else None
    if options.human_column is not None:  # Fail before sampling.
        load_mauve()
        for encoded in sets.values():
            human_texts(encoded, options.human_column)
    panel = Panel(
        scorer=scorer,
        perplexity_model=PerplexityModel(models.perplexity, models.policy),
        judges=dict(zip(unique_names(("+".join(judge.names) for judge in judges), {"reward"}), judges, strict=True)),
        threshold=options.threshold,
        batch_size=options.batch_size,
        resamples=options.resamples,
        human_column=options.human_column,
        max_tokens=sampling.max_new_tokens,
    )
    if target:
        target.check_metric(panel.metric_names)
    if keep_special_tokens is None:
        keep_special_tokens = keeps_special_tokens(options.steered_by or model)
    known = {(row.prompts_name, row.name): row for row in known_rows}
    bench = _Bench(models, options, panel, sets, known, keep_special_tokens, notify)
    rows = [bench.measure(variant, name) for name in sets for variant in variants]
    protocol = _protocol(models, options, sets, corpus, panel)
    if target:
        searched, protocol["target"] = bench.search(target)
        known_ids = set(map(id, rows))
        rows += [row for row in searched if id(row) not in known_ids]
    corpus_rows = [
        corpus_row(v.name, v.generator, corpus.ids, v.requested, options.batch_size, options.resamples)
        for v in variants
        if corpus and v.guidance_scale == 1
    ]
    return Evaluation(rows, protocol, sets, corpus_rows)


@dataclass(frozen=True)
class _Bench:
    """What measures variants of a model. A row that is known is not measured again."""

    models: _Models
    options: EvaluationOptions
    panel: Panel
    sets: dict[str, Prompts]
    known: dict[tuple[str, str], Row]
    keep_special_tokens: bool
    notify: Notify

    def measure(self, variant: _Variant, set_name: str) -> Row:
        """Return the row of a variant on a set of prompts."""
        key = (set_name, variant.name)
        if key not in self.known:
            title = variant.name if len(self.sets) == 1 else f"{set_name}: {variant.name}"
            prompts = self.sets[set_name]
            ids = _sample(variant, prompts, self.options, partial(self.notify, title))
            self.known[key] = _measure(variant, set_name, prompts, ids, self.panel, self.keep_special_tokens)
        return self.known[key]

    def search(self, target: Target) -> tuple[list[Row], dict[str, Any]]:
        """Search on the first set; return its rows, those of the chosen scale on the other sets, and the outcome."""
        first, *others = self.sets
        scales = [float(scale) for scale in self.options.guidance_scales] or SCALES
        choice = search(target, partial(self._measure_scale, set_name=first), scales)
        scale = (choice.row or choice.nearest).guidance_scale
        return [*choice.rows, *(self._measure_scale(scale, name) for name in others)], choice.to_json()

    def _measure_scale(self, scale: float, set_name: str) -> Row:
        """Return the row of the best quantile at a scale. It may have been measured under the quantile's number."""
        guided = _guided(self.models.policy, scale)
        rows = [row for (name, _), row in self.known.items() if name == set_name]
        points = {(row.quantile, row.guidance_scale): row for row in rows}
        return points.get((guided.quantile, guided.guidance_scale)) or self.measure(guided, set_name)


def _load_models(model: str | os.PathLike, options: EvaluationOptions) -> _Models:
    """Load the policy, its reference and the perplexity model; no model is loaded twice."""
    load_options: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    load_options |= {"dtype": "bfloat16"} if options.bf16 else {}
    policy = QuarkGenerator.from_pretrained(
        model, **load_options, **options.chat_defaults(), steered_by=options.steered_by
    )
    ref_name = reference_name(model) if options.reference is None else str(options.reference)
    ref_name = None if options.reference == NO_REFERENCE else ref_name
    reference: QuarkGenerator | None = None
    if policy.steered_by and options.reference is None:
        ref_name, reference = str(model), QuarkGenerator(policy.model, policy.tokenizer, None)
    elif ref_name:
        reference = _load_reference(ref_name, model, policy, load_options)
    if reference:  # It need not be the one that quark.json names.
        policy.reference = reference.model
    perplexity_name = str(options.perplexity_model or ref_name or model)
    if reference and perplexity_name == ref_name:
        perplexity_model = reference
    elif options.perplexity_model is None:
        perplexity_model = policy
    else:
        perplexity_model = QuarkGenerator.from_pretrained(perplexity_name, **load_options)
    return _Models(policy, str(model), reference, ref_name, perplexity_model, perplexity_name)


def _check_decoder_only(models: _Models, option: str | None) -> None:
    """Check that the models read texts without a prompt, if an option needs it."""
    if option and any(generator.is_encoder_decoder for generator in (models.policy, models.perplexity)):
        raise UserError(f"{option}: must be left out for an encoder–decoder model. Remove --{option}.")


def _load_reference(
    name: str, model: str | os.PathLike, policy: QuarkGenerator, load_options: dict[str, Any]
) -> QuarkGenerator:
    try:
        reference = QuarkGenerator.from_pretrained(name, **load_options)
    except UserError as error:
        raise UserError(
            f"reference {name!r} of {model} cannot be loaded ({error}). "
            "Set --reference to the model before training, or to none."
        ) from error
    if not has_same_vocabulary(reference, policy):
        raise UserError(
            f"reference {name!r}: must have the vocabulary of {model}. Set --reference to the model before "
            "training, or to none; --perplexity_model takes any model."
        )
    return reference


def _variants(models: _Models, options: EvaluationOptions) -> list[_Variant]:
    """The rows to measure.

    Raises:
        UserError: a requested quantile does not exist, or guidance is not possible.
    """
    policy, scales = models.policy, options.guidance_scales
    variants = [_Variant("reference", models.reference, "best")] if models.reference else []
    if policy.guide.conditioning is None:
        if options.target or any(scale != 1 for scale in options.guidance_scales):
            name = "target" if options.target else "guidance_scales"
            raise UserError(
                f"{name}: {models.policy_name} was not trained with Quark and has no quantiles. Remove the option."
            )
        return [*variants, _Variant("model", policy, "best")]
    quantiles: Sequence[str | int] = options.quantiles
    if policy.steered_by:  # Without guidance, every quantile is the model alone.
        quantiles, scales = (), scales or (STEERING.guidance_scale,)
    elif list(quantiles) == [ALL_QUANTILES]:
        quantiles = range(policy.guide.conditioning.num_quantiles)
    variants += [_Variant(str(quantile), policy, quantile) for quantile in quantiles]
    # `quantile` fails for a quantile that does not exist.
    known = {(variant.quantile, 1.0) for variant in variants if variant.generator is policy}
    for scale in () if options.target else scales:  # A search measures them one by one.
        guided = _guided(policy, scale)
        if (guided.quantile, guided.guidance_scale) not in known:
            variants.append(guided)
    for scale in SCALES if options.target else scales:
        _guided(policy, scale).contrast([], options)  # Fail before sampling if there is no contrast.
    return variants


def _guided(policy: QuarkGenerator, scale: GuidanceScale) -> _Variant:
    """The best quantile with guidance."""
    if isinstance(read_scale(scale), dict):
        return _Variant(f"best γ: {scale}", policy, "best", scale)
    number = float(scale)
    return _Variant("best" if number == 1 else f"best γ={number:g}", policy, "best", number)


def _encode(prompts: Prompts, policy: QuarkGenerator, max_length: int, options: EvaluationOptions) -> Prompts:
    """The prompts with their token ids, without reward tokens."""
    # The tokenizer of a trained model adds the best reward tokens. They count towards `max_length`.
    encoded = prompts.encode(
        policy.tokenizer,
        max_length=max_length,
        skip_bad=options.skip_bad_prompts,
        reserved=policy.conditioning.token_names if policy.conditioning else [],
        is_bad_start=policy.has_misplaced_reward_tokens,
        last_assistant_turn=options.last_assistant_turn,
    )
    return replace(encoded, ids=policy.strip(encoded.as_encoded, encoded.ids))


def _sample(
    variant: _Variant,
    prompts: Prompts,
    options: EvaluationOptions,
    on_progress: Callable[[int, int], None],
) -> list[list[int]]:
    """Token ids of S completions of each prompt, in the order of the prompts."""
    generator = variant.generator
    plain_ids = [ids for ids in prompts.ids for _ in range(options.samples_per_prompt)]
    finished = 0

    def on_batch(count: int) -> None:
        nonlocal finished
        finished += count
        on_progress(finished, len(plain_ids))

    return generator.complete(
        [generator.condition(ids, variant.requested) for ids in plain_ids],
        options.strategy(),
        seed=options.seed,
        batch_size=options.batch_size,
        on_batch=on_batch,
        contrast=variant.contrast(plain_ids, options),
    )


def _measure(
    variant: _Variant,
    set_name: str,
    prompts: Prompts,
    completion_ids: list[list[int]],
    panel: Panel,
    keep_special_tokens: bool,
) -> Row:
    generator = variant.generator
    samples = len(completion_ids) // len(prompts)
    prompt_ids = [ids for ids in prompts.ids for _ in range(samples)]
    texts = generator.decode(prompt_ids, completion_ids, keep_special_tokens)
    completions = Completions(prompts, completion_ids, texts, generator.end_ids)
    try:
        measurement = panel.measure(completions)
    except UserError as error:
        raise UserError(f"{variant.name}: {error}") from error
    return Row(
        name=variant.name,
        completions=completions.texts_by_prompt,
        prompts_name=set_name,
        quantile=variant.quantile,
        guidance_scale=variant.guidance_scale,
        **vars(measurement),
    )


def _protocol(
    models: _Models, options: EvaluationOptions, sets: dict[str, Prompts], corpus: Prompts | None, panel: Panel
) -> dict[str, Any]:
    """The settings that the figures depend on, JSON-able."""
    generators = {
        models.policy_name: models.policy,
        str(models.reference_name): models.reference,
        models.perplexity_name: models.perplexity,
        str(options.steered_by): models.policy.steered_by,
    }
    retokenized = "" if panel.perplexity_model.same_vocabulary else "; text tokenised anew by the perplexity model"
    return {
        "model": models.policy_name,
        "reference": models.reference_name,
        "steered_by": options.steered_by and str(options.steered_by),
        "perplexity_model": models.perplexity_name,
        "weights": [model_provenance(name, generator.model) for name, generator in generators.items() if generator],
        "prompts": {name: prompts_provenance(prompts) for name, prompts in sets.items()},
        "samples_per_prompt": options.samples_per_prompt,
        "batch_size": options.batch_size,
        "sampling": asdict(options.strategy()),
        "seed": options.seed,
        "guidance_from": str(options.guidance_from) if options.guides else None,
        "guidance_rule": options.guidance_rule if options.guides else None,
        "rewards": panel.scorer.identity,
        "judges": {name: judge.identity for name, judge in panel.judges.items()},
        "perplexity": "exp(mean token NLL over the original vocabulary) per completion given its prompt, without "
        f"reward tokens or EOS; >= 1e4 dropped; mean{retokenized}",
        "threshold": options.threshold,
        "human_column": options.human_column,
        "corpus": corpus and prompts_provenance(corpus),
        "corpus_metrics": "next tokens over the original vocabulary, after the row's reward tokens" if corpus else None,
        "intervals": {
            "level": LEVEL,
            "method": "percentile bootstrap over prompts",
            "resamples": options.resamples,
            "seed": SEED,
        },
        **environment(models.policy.model.device),
    }
