"""The `Reward` protocol: the built-in rewards keep what it documents."""

import inspect
import json

import pytest
from helpers.errors import error_message

from quarkrl.rewards import Judge, Perspective, Repetition, resolve
from quarkrl.rewards.identity import name_of
from quarkrl.rewards.reward import PARAMETERS, Reward, is_cached

LOCAL = "http://127.0.0.1:9/v1"


def build(name):
    if name in ("profanity", "vader", "vader-negative"):
        pytest.importorskip("profanity_check" if name == "profanity" else "vaderSentiment")
    specs = {"judge": f"judge?endpoint={LOCAL}&model=m&rubric=r", "perspective": f"perspective?endpoint={LOCAL}"}
    return resolve(specs.get(name, name))


@pytest.mark.parametrize("name", ["judge", "perspective", "profanity", "repetition", "vader", "vader-negative"])
def test_the_optional_attributes_of_a_built_in_reward_are_of_the_documented_types(name):
    reward = build(name)
    assert isinstance(reward.name, str) and reward.name == name_of(reward)
    assert json.loads(json.dumps(reward.identity)) == reward.identity
    parameters = inspect.signature(reward).parameters
    assert set(getattr(reward, "reads", ())) <= set(parameters) & set(PARAMETERS)
    assert getattr(reward, "unwanted", None) is None or isinstance(reward.unwanted, str)
    assert is_cached(reward) == (name != "repetition")


def test_the_protocol_documents_every_parameter_and_attribute():
    documentation = inspect.getdoc(Reward)
    attributes = ("name", "identity", "cached", "reads", "unwanted", "wanted", "wanted_from")
    assert all(f"\n    {parameter}: " in documentation for parameter in PARAMETERS)
    assert all(f"\n    {attribute} (" in documentation for attribute in attributes)


def test_a_reward_without_an_identity_or_with_cached_false_is_not_cached():
    def plain(completions):
        return [0.0]

    assert not is_cached(plain) and not is_cached(Repetition())
    plain.identity = {"version": 1}
    assert is_cached(plain)
    plain.cached = False
    assert not is_cached(plain)


def test_endpoints_are_checked_before_any_request():
    for build_reward in (lambda: Perspective(endpoint="nowhere"), lambda: Judge("nowhere", "m", "r")):
        assert "endpoint: must be http://HOST/PATH" in error_message(build_reward)
