"""The reward that a `quark.json` records is named again by its spec; a user's function is not."""

from __future__ import annotations

import pytest

from quarkrl.errors import UserError
from quarkrl.rewards.recorded import specs_of
from quarkrl.rewards.scorer import Scorer

SPECS = ["brevity?max_words=9", "vader", "vader-negative", "repetition?unit=words&min_units=5"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_recorded_reward_has_the_identity_of_its_spec(spec):
    identity = Scorer(spec).identity
    assert Scorer(specs_of(identity)).identity == identity


def test_a_recorded_classifier_is_named_by_its_model_and_label():
    identity = {
        "name": "bert-not toxic",
        "model": "org/bert",
        "label": "not toxic",
        "text": "both",
        "function": "softmax",
    }
    assert specs_of([identity]) == ["org/bert?label=not+toxic&text=both"]


def mine(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize("identity", [Scorer(mine).identity, [{"name": "judge", "endpoint": "http://localhost"}], 3])
def test_what_cannot_be_named_again_is_refused(identity):
    with pytest.raises(UserError, match="Set --reward"):
        specs_of(identity)
