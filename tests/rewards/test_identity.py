"""The identity of a reward: it distinguishes functions, is JSON-able, and is equal on every machine."""

import functools
import hashlib
import json

from helpers.errors import error_message
from helpers.reward_helpers import length

from quarkrl.rewards import Scorer


def test_the_identity_of_a_function_is_json_and_contains_the_hash_of_its_source():
    def other(completions):
        return [0] * len(completions)

    first, second = Scorer([length, other], weights=[1, 2]).identity
    assert first["name"] == first["qualname"] == "length" and first["module"] == length.__module__
    source = "def length(completions):\n    return [len(text) for text in completions]\n"
    assert first["sha256"] == hashlib.sha256(source.encode()).hexdigest() != second["sha256"]
    assert (first["weight"], second["weight"]) == (1.0, 2.0)
    assert json.loads(json.dumps([first, second])) == [first, second]


def test_the_identity_of_a_partial_contains_its_arguments():
    half, third = (Scorer(functools.partial(length, x=x)).identity[0] for x in (1 / 2, 1 / 3))
    assert half != third


def test_the_identity_of_an_object_is_its_attribute_and_must_be_json():
    class Mine:
        name, identity = "mine", {"model": "m", "version": 3}

        def __call__(self, completions):
            return length(completions)

    assert Scorer(Mine()).identity == [{"name": "mine", "model": "m", "version": 3, "weight": 1.0}]
    Mine.identity = {"model": object()}
    assert "reward 'mine' attribute identity: must be JSON-able" in error_message(lambda: Scorer(Mine()))
    Mine.identity = "me"
    assert "reward 'mine' attribute identity: must be a dict" in error_message(lambda: Scorer(Mine()))
