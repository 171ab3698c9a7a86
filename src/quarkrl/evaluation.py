"""Evaluation: sample, score, measure; and the protocol beside the numbers, without which they mean nothing."""

import datetime
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from quarkrl import metrics
from quarkrl.batches import padded
from quarkrl.conditioning import load_facts
from quarkrl.errors import UserError
from quarkrl.generation import QuarkGenerator, Sampling, complete
from quarkrl.loss import completion_logits
from quarkrl.prompts import Prompts
from quarkrl.rewards import Scorer

Notify = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One line of an evaluation: a model, asked for one quantile.

    Attributes:
        name: "reference", or the quantile asked for.
        figures: metric name → value.
        left_out: why completions did not count → how many.
        completions: for each prompt, its texts.
        rewards: `(P, S)`, NaN where there is none.
    """

    name: str
    figures: dict[str, float]
    left_out: dict[str, int]
    completions: list[list[str]]
    rewards: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """Rows to compare, and the protocol that produced them."""

    rows: list[Row]
    protocol: dict[str, Any]
    prompts: Prompts

    def save(self, path: str | os.PathLike) -> None:
        """Write figures, protocol and completions as JSON; the file appears whole or not at all."""
        document = {
            "protocol": self.protocol,
            "results": [
                {"name": row.name, "figures": _without_nan(row.figures), "left_out": row.left_out} for row in self.rows
            ],
            "completions": [
                {"prompt": prompt, **{row.name: row.completions[i] for row in self.rows}}
                for i, prompt in enumerate(self.prompts.prompts)
            ],
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, target)


def evaluate(
    model: str | os.PathLike,
    prompts: Prompts,
    scorer: Scorer,
    *,
    reference: str | os.PathLike | None = None,
    quantiles: Sequence[str | int] = ("best", "worst"),
    sampling: Sampling | None = None,
    samples: int = 25,
    seed: int = 0,
    batch_size: int = 128,
    notify: Notify = lambda row, done, total: None,
) -> Evaluation:
    """Measure a model beside its reference on the same prompts.

    Args:
        model: a model that Quark trained, or any causal language model (which then has one row, "model").
        prompts: what to continue.
        scorer: the reward; one that is 1 - something unwanted gives that thing's metrics too.
        reference: the model before training; it also scores perplexity. By default what `model` was trained from.
        quantiles: which quantiles of `model` to ask for, a row each.
        sampling: how to decode; nucleus 0.9 and 20 tokens by default.
        samples: completions for each prompt, S.
        seed: the same gives the same completions.
        batch_size: completions sampled at a time.
        notify: called with a row's name and how many of its completions are done.

    Raises:
        UserError: the reference cannot be loaded, a quantile does not exist, a prompt is too long.
    """
    sampling = sampling or Sampling()
    policy = QuarkGenerator.from_pretrained(model)
    facts = load_facts(model) or {}
    if reference is None:
        reference = facts.get("reference", {}).get("name")
    elif str(reference) == "none":
        reference = None
    base = _load_reference(reference, model) if reference else None
    fluency = base or policy  # Whose perplexity is reported.
    encoded = prompts.encode(policy.tokenizer, max_length=policy.context_length - sampling.max_new_tokens)
    if policy.conditioning:  # Its tokenizer puts the best reward tokens first.
        encoded.ids = [policy.conditioning.strip(ids) for ids in encoded.ids]
    asked: list[tuple[str, QuarkGenerator, str | int]] = [("reference", base, "best")] if base else []
    asked += [(str(q), policy, q) for q in quantiles] if policy.conditioning else [("model", policy, "best")]
    for _, generator, quantile in asked:
        generator.condition([], quantile)  # One that does not exist stops here, before any sampling.

    rows = []
    for name, generator, quantile in asked:
        conditioned = [generator.condition(ids, quantile) for ids in encoded.ids for _ in range(samples)]
        done = 0

        def on_batch(count: int, name: str = name, total: int = len(conditioned)) -> None:
            nonlocal done
            done += count
            notify(name, done, total)

        ids = complete(
            generator.model,
            conditioned,
            sampling,
            end_ids=generator.end_ids,
            vocab_size=generator.vocab_size,
            seed=seed,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        rows.append(_measure(name, encoded, ids, samples, generator, fluency, scorer, batch_size))
    protocol = {
        "model": str(model),
        "reference": None if reference is None else str(reference),
        "prompts": {"count": len(encoded), "left_out": encoded.skipped},
        "samples_per_prompt": samples,
        "sampling": asdict(sampling),
        "seed": seed,
        "rewards": scorer.identity,
        "perplexity_model": str(reference or model),
        "perplexity": "exp(mean token NLL) per completion given its prompt, without EOS; >= 1e4 dropped; mean",
        "threshold": metrics.THRESHOLD,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("quarkrl", "torch", "transformers", "numpy")},
        "python": platform.python_version(),
    }
    return Evaluation(rows, protocol, encoded)


def completion_nll(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int,
) -> list[float]:
    """For each completion, the sum of its tokens' negative log-likelihoods given its prompt, in nats.

    An empty completion gives 0.
    """
    sums = [0.0] * len(completion_ids)
    order = sorted(
        (i for i, ids in enumerate(completion_ids) if ids), key=lambda i: len(prompt_ids[i]) + len(completion_ids[i])
    )
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = padded([prompt_ids[i] for i in rows], [completion_ids[i] for i in rows])
        input_ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
        with torch.inference_mode():
            logits = completion_logits(model, input_ids, mask, labels)
            nll = torch.nn.functional.cross_entropy(logits.float(), labels[labels != -100], reduction="none")
        ends = np.cumsum([len(completion_ids[i]) for i in rows])
        for i, values in zip(rows, np.split(nll.double().cpu().numpy(), ends[:-1]), strict=True):
            sums[i] = float(values.sum())
    return sums


def _measure(
    name: str,
    prompts: Prompts,
    ids: list[list[int]],
    samples: int,
    generator: QuarkGenerator,
    fluency: QuarkGenerator,
    scorer: Scorer,
    batch_size: int,
) -> Row:
    texts = generator.decode(ids)
    repeated = [prompt for prompt in prompts.prompts for _ in range(samples)]
    columns = {key: [value for value in values for _ in range(samples)] for key, values in prompts.columns.items()}
    rewards = scorer(repeated, texts, ids, columns).rewards.mean(axis=1)
    grouped = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    by_prompt = rewards.reshape(-1, samples)

    scored = rewards[~np.isnan(rewards)]
    if not len(scored):
        raise UserError(f"none of the {len(rewards)} completions of {name!r} has a reward: nothing to evaluate")
    figures = {"reward": float(scored.mean())}
    if scorer.unwanted:
        scores = 1 - by_prompt
        figures |= {
            scorer.unwanted: float(1 - scored.mean()),
            f"average maximum {scorer.unwanted}": metrics.average_maximum(scores),
            f"{scorer.unwanted} probability": metrics.probability(scores),
            f"{scorer.unwanted} share": float(np.mean(1 - scored >= metrics.THRESHOLD)),
        }
    ends = set(generator.end_ids)
    words = [row[:-1] if row and row[-1] in ends else row for row in ids]
    prompt_ids = [row for row in prompts.ids for _ in range(samples)]
    nll = completion_nll(fluency.model, prompt_ids, words, batch_size)
    figures["perplexity"], left_out = metrics.perplexity(nll, [len(row) for row in words])
    for n in (1, 2, 3):
        figures[f"dist-{n}"] = metrics.distinct(grouped, n)
    figures["completion length"] = float(np.mean([len(row) for row in ids]))
    left_out = {"unscored": int(np.isnan(rewards).sum()), **{f"perplexity_{k}": v for k, v in left_out.items()}}
    return Row(name, figures, left_out, grouped, by_prompt)


def _without_nan(figures: dict[str, float]) -> dict[str, float | None]:
    """The figures with None, null in JSON, where there was nothing to take a mean of."""
    return {name: None if np.isnan(value) else value for name, value in figures.items()}


def _load_reference(reference: str | os.PathLike, model: str | os.PathLike) -> QuarkGenerator:
    try:
        return QuarkGenerator.from_pretrained(reference)
    except UserError as error:
        raise UserError(
            f"the reference of {model} is {str(reference)!r}, which cannot be loaded ({error}); "
            "give --reference PATH, or --reference none to go without"
        ) from error
