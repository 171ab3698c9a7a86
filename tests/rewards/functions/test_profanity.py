"""`Profanity`: 1 - the probability that alt-profanity-check gives."""

import numpy as np
import pytest

from quarkrl.rewards import Profanity, Scorer


def test_the_reward_is_one_minus_the_packages_probability():
    predict_prob = pytest.importorskip("profanity_check").predict_prob
    texts = ["have a nice day", "you are a fucking idiot", ""]
    scorer = Scorer("profanity")
    rewards = scorer(texts, texts, texts).rewards[:, 0]
    np.testing.assert_allclose(rewards, 1 - predict_prob(texts))
    assert rewards[0] > 0.9 and rewards[1] < 0.01 and 0 <= rewards[2] <= 1
    assert Profanity()([]) == [] and scorer.unwanted == "toxicity"
    assert set(Profanity().identity) == {"name", "alt-profanity-check", "scikit-learn"}
