"""The sentence that says what a run has changed."""

from __future__ import annotations

import numpy as np
import pytest

from quarkrl.evaluation.results import Row
from quarkrl.evaluation.verdict import compare, describe


def row(rewards, perplexity: float = 5.0, length: float = 10.0) -> Row:
    rewards = np.array(rewards, float)
    perplexities = np.full(rewards.shape, perplexity)
    return Row(
        name="reference",
        completions=[],
        prompts_name="prompts",
        quantile=None,
        guidance_scale=1.0,
        figures={"reward": float(np.nanmean(rewards)), "perplexity": perplexity, "completion length": length},
        intervals={},
        left_out={},
        truncated=0,
        scores={"reward": rewards},
        perplexities=perplexities,
    )


BEFORE = [[0.0, 0.2]] * 8 + [[0.4, 0.6]] * 8


@pytest.mark.parametrize(("shift", "kind"), [(0.3, "better"), (-0.3, "worse"), (0.0, "no clear change")])
def test_a_change_is_judged_by_its_interval(shift, kind):
    after = [[a + shift, b + shift] for a, b in BEFORE]
    change = compare(row(BEFORE), row(after))
    assert change.kind == kind
    # Every prompt has moved by the same amount, so resampled prompts have, too.
    assert change.interval == pytest.approx((shift, shift))
    assert describe(row(BEFORE), row(after)).startswith(f"{kind}: the reward went from 0.300 to {0.3 + shift:.3f}")


def test_prompts_are_compared_with_themselves():
    """The rewards of the prompts differ by 10, their changes by 0.01: the change is clear all the same."""
    before, after = [[float(i)] for i in range(11)], [[i + 0.1 + 0.001 * i] for i in range(11)]
    assert compare(row(before), row(after)).kind == "better"


def test_half_of_the_prompts_up_and_half_down_is_no_clear_change():
    after = [[a + sign, b + sign] for (a, b), sign in zip(BEFORE, [0.5, -0.5] * 8, strict=True)]
    sentence = describe(row(BEFORE), row(after))
    assert sentence.startswith("no clear change") and "--num_iterations" in sentence


def test_a_missing_reward_does_not_count():
    before, after = [[0.0, np.nan], [np.nan, np.nan], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [np.nan, 1.0]]
    assert compare(row(before), row(after)).interval == (1.0, 1.0)


def shifted(shift: float, perplexity: float = 5.0, length: float = 10.0) -> Row:
    return row([[a + shift, b + shift] for a, b in BEFORE], perplexity, length)


def test_a_run_that_does_what_it_should_gets_no_advice():
    assert describe(row(BEFORE), shifted(0.3), shifted(-0.1)) == (
        "better: the reward went from 0.300 to 0.600 (change +0.300, 95 % interval +0.300 to +0.300) "
        "on held-out prompts."
    )


def test_better_at_a_high_perplexity_says_so_and_how_to_mend_it():
    sentence = describe(row(BEFORE), shifted(0.3, 15.0), shifted(-0.1))
    assert sentence.startswith("better, but perplexity rose: the reward went from 0.300 to 0.600")
    assert "perplexity went from 5.00 to 15.00 (medians 5.00 to 15.00). Try a higher --kl_coef or a lower" in sentence
    assert describe(row(BEFORE), shifted(0.3, 7.0), shifted(-0.1)).startswith("better:")


def test_better_with_equal_tokens_says_that_they_do_not_steer():
    sentence = describe(row(BEFORE), shifted(0.3), shifted(0.3))
    assert sentence.startswith("better, but the tokens do not steer: ")
    assert "from the worst to the best quantile it goes from 0.600 to 0.600 (change +0.000" in sentence
    assert sentence.endswith("Try more --num_iterations, so that the tokens learn what sets them apart.")
    both = describe(row(BEFORE), shifted(0.3, 15.0), shifted(0.3))
    assert both.startswith("better, but perplexity rose and the tokens do not steer: ")


@pytest.mark.parametrize(("shift", "perplexity"), [(0.0, 5.0), (0.3, 15.0), (-0.3, 5.0)])
def test_the_advice_after_too_many_draws_is_that_of_the_warning(shift, perplexity):
    remedy = "--steps_per_iteration 8, or a higher --samples_per_prompt"
    sentence = describe(row(BEFORE), shifted(shift, perplexity), shifted(shift), remedy)
    assert sentence.endswith(f" Each completion was drawn too often: try {remedy}.")
    assert "--num_iterations" not in sentence and "--learning_rate" not in sentence


def test_little_to_gain_is_named():
    full = row([[1.0, 1.0]] * 16)
    assert "100% of the completions had the highest reward before" in describe(full, full)


def test_medians_show_that_a_few_completions_raise_the_mean_perplexity():
    after = shifted(0.3, 15.0)
    after.perplexities[:] = 5.5
    after.perplexities[0, 0] = 500
    assert "perplexity went from 5.00 to 15.00 (medians 5.00 to 5.50)" in describe(row(BEFORE), after, shifted(-0.1))


def test_a_worst_quantile_above_the_start_and_shorter_completions_are_named():
    sentence = describe(row(BEFORE), shifted(0.3, length=7), shifted(0.1))
    assert sentence.startswith("better: the reward went from 0.300 to 0.600")
    assert (
        " The worst quantile is better than before, too (0.400). Completions are shorter, 10.0 to 7.0 tokens."
        in sentence
    )
    same = describe(row(BEFORE), shifted(0.3, length=8), shifted(0.0))
    assert "worst quantile" not in same and "shorter" not in same
