"""Phrases ranked by what they tell a model: the AUC by hand, bad completions, and a model that knows a word."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.eight_letters import TOKENIZER
from helpers.tiny_models import tiny_model

from quarkrl.builtin import model_path, prompts_path
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.phrases import ScoredSamples, area_under_curve, rank_phrases, sample_and_score
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.strategy import Sampling


def by_pairs(values, positive) -> float:
    pairs = [(a, b) for a in values[positive] for b in values[~positive]]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(20))
def test_the_area_is_the_share_of_pairs_in_the_right_order(seed):
    rng = np.random.default_rng(seed)
    values, positive = rng.integers(0, 6, 30).astype(float), rng.random(30) < 0.3
    positive[:2] = True, False
    auc, margin = area_under_curve(values, positive)
    assert auc == pytest.approx(by_pairs(values, positive)) and margin > 0


@pytest.mark.parametrize(
    ("rewards", "bad"),
    [
        ([0.1, 0.9, 0.8, 0.7, 0.6], [True, False, False, False, False]),
        ([0.1, 0.1, 0.8, 0.7, 0.6], [True, True, False, False, False]),  # Equal rewards are on one side.
        ([0.2] * 9 + [1.0], [True] * 9 + [False]),
        ([1.0] * 9 + [0.2], [False] * 9 + [True]),
    ],
)
def test_the_worst_fifth_is_bad(rewards, bad):
    assert ScoredSamples([], [], np.array(rewards)).is_bad.tolist() == bad


def test_equal_rewards_are_refused():
    with pytest.raises(UserError, match=r"reward 0\.5: must differ between completions, and all 3 have this one"):
        _ = ScoredSamples([], [], np.full(3, 0.5)).is_bad


def test_a_phrase_without_tokens_is_refused():
    generator = QuarkGenerator(tiny_model("gpt2", TOKENIZER), TOKENIZER, None)
    samples = ScoredSamples([[0], [1]], [[1], [2]], np.array([0.0, 1.0]))
    with pytest.raises(UserError, match="words '': must have at least one token"):
        rank_phrases(generator, samples, [""], batch_size=8)


def test_the_built_in_model_knows_rude_and_polite_speakers():
    generator = QuarkGenerator.from_pretrained(model_path())
    prompts = load_prompts(str(prompts_path("eval"))).first(150)
    prompts = prompts.encode(generator.tokenizer, max_length=64)
    samples = sample_and_score(
        generator, prompts, Scorer("profanity"), Sampling(), samples_per_prompt=5, seed=0, batch_size=64
    )
    assert len(samples.rewards) == 750 and 100 < samples.is_bad.sum() < 200
    phrases = ["Polite customer says:", "Vulgar customer says:"]
    vulgar, polite = rank_phrases(generator, samples, phrases, batch_size=64)
    assert vulgar.text == phrases[1] and vulgar.auc > 0.5
    assert polite.text == phrases[0] and polite.auc + polite.margin < 0.5
    assert vulgar.auc - vulgar.margin > polite.auc + polite.margin
    assert vulgar.tokens == len(generator.tokenizer.encode(phrases[1]))
