"""`Vader`: the compound score, by hand."""

import pytest

from quarkrl.rewards import Scorer, Vader, resolve


def test_the_reward_is_the_compound_score_or_its_negative():
    pytest.importorskip("vaderSentiment")
    texts = ["good", "bad", "", "the table"]
    # The lexicon gives good 1.9 and bad -2.5; compound is v / sqrt(v² + 15).
    assert Vader()(texts) == [0.4404, -0.5423, 0.0, 0.0]
    assert resolve("vader-negative")(texts) == [-0.4404, 0.5423, 0.0, 0.0]
    assert Scorer("vader-negative").names == ("vader-negative",)
    positive, negative = Scorer("vader"), Scorer("vader-negative")
    assert (positive.unwanted, positive.wanted, positive.wanted_from) == (None, "positive", 0.05)
    assert (negative.unwanted, negative.wanted, negative.wanted_from) == (None, "negative", 0.05)
