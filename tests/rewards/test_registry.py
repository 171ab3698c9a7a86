"""`resolve`: what a name, a path or an object means, and the errors for those that mean nothing."""

import os
import subprocess
import sys
from unittest.mock import Mock

import huggingface_hub
import pytest
from helpers.errors import error_message
from helpers.reward_helpers import length
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from quarkrl.rewards import Profanity, Repetition, resolve


def test_a_callable_is_returned_unchanged():
    assert resolve(length) is length


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("profnity", "reward 'profnity': must be a known name. Did you mean 'profanity'? (known: brevity, judge, "),
        ("Vader", "Did you mean 'vader'?"),
        ("vader_negative", "Did you mean 'vader-negative'?"),
        ("./no/such/model", "reward './no/such/model': must be an existing directory"),
        ("", "reward '': must be one of brevity, judge, perspective, "),
        (3, "reward 3: must be a function, a name or a path, not of type int"),
        (Profanity, "must be a function or an object, not a class. Use Profanity(…)"),
    ],
)
def test_a_name_that_means_nothing_is_an_error_that_names_the_nearest(spec, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in error_message(lambda: resolve(spec))


def test_label_and_unwanted_are_refused_for_a_reward_that_is_not_a_classifier():
    for spec in ("repetition", Repetition()):
        for option in ("label", "unwanted"):
            message = error_message(lambda spec=spec, option=option: resolve(spec, **{option: "positive"}))
            assert f"{option} 'positive': must be unset" in message
        resolve(spec, device="cpu")  # May be given for all rewards together.


def test_a_model_that_the_hub_does_not_have_and_a_hub_that_cannot_be_reached(monkeypatch):
    def refuse(error):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))

    unknown = "must be a known name, a directory or a model on the Hugging Face hub"
    assert unknown in error_message(lambda: resolve("not a name!"))  # Without a request to the hub.
    refuse(RepositoryNotFoundError("404", response=Mock()))
    assert unknown in error_message(lambda: resolve("nobody/nothing-at-all"))
    refuse(GatedRepoError("403", response=Mock()))
    assert "'nobody/nothing-at-all': gated model" in error_message(lambda: resolve("nobody/nothing-at-all"))
    refuse(ConnectionError("no route"))
    assert "the Hugging Face hub cannot be reached (ConnectionError: no route" in error_message(
        lambda: resolve("nobody/nothing-at-all")
    )


@pytest.mark.parametrize(("name", "module"), [("profanity", "profanity_check"), ("vader", "vaderSentiment")])
def test_a_missing_optional_package_is_an_error_with_the_command_that_installs_it(name, module, monkeypatch):
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # Makes its import fail.
    message = error_message(lambda: resolve(name))
    assert f"reward {name!r}: " in message and 'pip install "quarkrl[offline]"' in message


def test_importing_rewards_does_not_import_the_optional_packages():
    code = "import sys, quarkrl.rewards.registry; print({'profanity_check', 'vaderSentiment'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert shown.stdout.strip() == "set()"
