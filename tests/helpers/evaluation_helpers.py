"""Models and rewards for tests of evaluation: a word-level GPT-2, the same with three quantiles, two rewards."""

from __future__ import annotations

from math import nan
from pathlib import Path

import numpy as np
import torch
from helpers.eight_letters import TOKENIZER as WORDS
from helpers.tiny_models import tiny_model

from quarkrl.data.prompts import load_prompts
from quarkrl.evaluation.options import EvaluationOptions
from quarkrl.evaluation.results import CorpusRow, Evaluation, Row
from quarkrl.models.conditioning import Conditioning

PROMPTS = ["a b", "c", "d e f"]


def save_plain_model(directory: Path) -> Path:
    """Save a tiny GPT-2 with the tokenizer WORDS."""
    tiny_model("gpt2", WORDS).save_pretrained(directory)
    WORDS.save_pretrained(directory)
    return directory


def save_quantile_model(directory: Path, reference: Path) -> Path:
    """Save the same model with the reward tokens of three quantiles and `reference` in quark.json, as a run does."""
    model = tiny_model("gpt2", WORDS)
    conditioning, tokenizer = Conditioning.add_to(WORDS, model, 3)
    model.save_pretrained(directory)
    conditioning.steer_tokenizer(tokenizer).save_pretrained(directory)
    conditioning.save(directory, reference={"name": str(reference)})
    return directory


def short(**values) -> EvaluationOptions:
    """Options for completions of at most 5 tokens, 2 per prompt, and few bootstrap resamples."""
    return EvaluationOptions(**{"max_new_tokens": 5, "samples": 2, "resamples": 100, **values})


def nll_by_hand(model, prompt: list[int], completion: list[int]) -> float:
    """The sum of a completion's negative log-likelihoods, from one forward pass over prompt and completion."""
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return -sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(completion))


class NoA:
    """1 - the share of the word "a", which is unwanted."""

    unwanted = "a-ness"

    def __call__(self, completions, **_):
        return [1 - text.split().count("a") / max(len(text.split()), 1) for text in completions]


def few_b(completions, **_):
    """Minus the number of words "b"."""
    return [-float(text.split().count("b")) for text in completions]


def row_with(
    name: str, reward: float, quantile: int | None = None, guidance_scale: float = 1.0, prompts: str = "in"
) -> Row:
    """A row of made-up figures that depend on the reward; each interval is 0.08 wide."""
    figures = {"reward": reward, "toxicity probability": 1 - reward, "vader: score": reward / 2}
    figures |= {"perplexity": 100 * reward, "dist-2": 0.8, "rep-2": 1.5, "diversity": nan}
    return Row(
        name=name,
        figures=figures,
        left_out={"unscored": 0, "perplexity_dropped": 3 if name == "best" else 0},
        completions=[[f"{name} a", f"{name} b"], [f"{name} c", f"{name} d"]],
        prompts_name=prompts,
        quantile=quantile,
        guidance_scale=guidance_scale,
        intervals={metric: (value - 0.03, value + 0.05) for metric, value in figures.items()},
        truncated=7 if name == "worst" else 0,
        scores={"reward": np.array([[0.5, nan], [0.9, 0.2]])},
        perplexities=np.ones((2, 2)),
    )


def evaluation_of(rows: list[Row], corpus: tuple[CorpusRow, ...] = ()) -> Evaluation:
    """An evaluation of two prompts per set, with as much of a protocol as the tables read."""
    sets = {row.prompts_name: load_prompts(["You are", "They said"]) for row in rows}
    protocol = {
        "prompts": {name: {"count": 2, "left_out": {"too long": 4} if name == "out" else {}} for name in sets},
        "samples_per_prompt": 2,
        "sampling": {"top_p": 0.9, "max_new_tokens": 20, "do_sample": True},
        "perplexity_model": "gpt2",
        "corpus": {"count": 7},
    }
    return Evaluation(rows, protocol, sets, list(corpus))
