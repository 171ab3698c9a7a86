"""The sentence that says what a run has changed."""

from __future__ import annotations

import numpy as np
import pytest

from quarkrl.evaluation.results import Row
from quarkrl.evaluation.verdict import compare, describe


def row(rewards, perplexity: float = 5.0) -> Row:
    rewards = np.array(rewards, float)
    return Row(
        name="reference",
        completions=[],
        prompts_name="prompts",
        quantile=None,
        guidance_scale=1.0,
        figures={"reward": float(np.nanmean(rewards)), "perplexity": perplexity},
        intervals={},
        left_out={},
        truncated=0,
        scores={"reward": rewards},
        perplexities=rewards,
    )


BEFORE = [[0.0, 0.2]] * 8 + [[0.4, 0.6]] * 8


@pytest.mark.parametrize(("shift", "kind"), [(0.3, "better"), (-0.3, "worse"), (0.0, "no clear change")])
def test_a_change_is_judged_by_its_interval(shift, kind):
    after = [[a + shift, b + shift] for a, b in BEFORE]
    change = compare(row(BEFORE), row(after))
    assert change.kind == kind
    # Every prompt has moved by the same amount, so resampled prompts have, too.
    assert change.interval == pytest.approx((shift, shift))
    assert describe(change, row(BEFORE), row(after)).startswith(
        f"{kind}: the reward went from 0.300 to {0.3 + shift:.3f}"
    )


def test_prompts_are_compared_with_themselves():
    """The rewards of the prompts differ by 10, their changes by 0.01: the change is clear all the same."""
    before, after = [[float(i)] for i in range(11)], [[i + 0.1 + 0.001 * i] for i in range(11)]
    assert compare(row(before), row(after)).kind == "better"


def test_half_of_the_prompts_up_and_half_down_is_no_clear_change():
    after = [[a + sign, b + sign] for (a, b), sign in zip(BEFORE, [0.5, -0.5] * 8, strict=True)]
    sentence = describe(compare(row(BEFORE), row(after)), row(BEFORE), row(after))
    assert sentence.startswith("no clear change") and "--num_iterations" in sentence


def test_a_missing_reward_does_not_count():
    before, after = [[0.0, np.nan], [np.nan, np.nan], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [np.nan, 1.0]]
    assert compare(row(before), row(after)).interval == (1.0, 1.0)


def test_the_verdict_says_what_to_try():
    after = [[a + 0.3, b + 0.3] for a, b in BEFORE]
    dear = describe(compare(row(BEFORE), row(after, 15.0)), row(BEFORE), row(after, 15.0))
    assert dear.startswith("better") and "perplexity is 3.0 times as high: try a higher --kl_coef" in dear
    full = row([[1.0, 1.0]] * 16)
    assert "100% of the completions had the highest reward before" in describe(compare(full, full), full, full)
