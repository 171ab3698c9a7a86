"""Settings of the page, as a query of a URL, and as values of the page's components."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

import pytest
from helpers.reward_token_models import reward_tokens

from quarkrl.errors import UserError
from quarkrl.playground.form import default_settings, fill_form, quantile_choices, read_form
from quarkrl.playground.settings import Settings

ONE = reward_tokens(["reward"], [[10, 11, 12]], [], 10)
TWO = reward_tokens(["kind", "short"], [[10, 11, 12], [13, 14, 15]], [], 10)


def test_a_query_holds_what_differs_from_the_defaults():
    settings = Settings(prompt="You & I", temperature=0.5, max_new_tokens=8)
    assert settings.to_query(Settings()) == "prompt=You+%26+I&temperature=0.5&max_new_tokens=8"
    assert Settings().to_query(Settings()) == ""


def test_a_query_restores_every_setting():
    settings = Settings(
        prompt="ä\n<b>",
        replies=("& 1", '"2"'),
        chat=True,
        system_prompt="Be brief.",
        quantile="kind=2,short=0",
        guidance_scale=1.5,
        guidance_rule="lower",
        temperature=0.7,
        top_p=0.5,
        max_new_tokens=9,
        num_return_sequences=2,
        seed=123456789,
    )
    query = dict(parse_qsl(settings.to_query(Settings())))
    assert len(query) == len(vars(settings)) and Settings.from_query(query, Settings()) == settings


def test_parameters_of_others_are_ignored():
    assert Settings.from_query({"__theme": "dark", "utm": "x", "seed": "3"}, Settings()) == Settings(seed=3)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("temperature", "warm", "must be a number"),
        ("temperature", "0", "must be greater than 0"),
        ("temperature", "nan", "must be greater than 0 and finite"),
        ("top_p", "1.5", "must be greater than 0 and at most 1"),
        ("num_return_sequences", "1000", "must be at least 1 and at most 32"),
        ("max_new_tokens", "2.5", "must be an integer"),
        ("seed", "-1", "must be at least 0"),
        ("guidance_rule", "upper", "must be both or lower"),
        ("replies", "more", "must be a list of texts in JSON"),
        ("replies", "[1]", "must be a list of texts in JSON"),
    ],
)
def test_a_bad_value_in_a_query_is_named(name, value, limit):
    with pytest.raises(UserError, match=f"^{name} .*{re.escape(limit)}"):
        Settings.from_query({name: value}, Settings())


def test_numbers_of_components_may_be_floats_or_missing():
    assert Settings.from_page(prompt="x", seed=3.0, max_new_tokens=20).seed == 3
    with pytest.raises(UserError, match="seed '': must be an integer"):
        Settings.from_page(seed=None)


def test_quantiles_are_labelled_from_worst_to_best():
    assert quantile_choices(4) == [("worst", "0"), ("1", "1"), ("2", "2"), ("best", "3")]
    assert quantile_choices(2) == [("worst", "0"), ("best", "1")]


@pytest.mark.parametrize(("conditioning", "quantile"), [(ONE, "1"), (TWO, "kind=2,short=0"), (None, "best")])
def test_a_form_restores_its_settings(conditioning, quantile):
    settings = Settings(prompt="x", quantile=quantile)
    assert read_form(fill_form(settings, conditioning), Settings()) == settings


def test_the_default_quantile_is_not_in_the_query():
    defaults = default_settings(TWO, max_new_tokens=7)
    assert defaults.quantile == "kind=2,short=2" and defaults.max_new_tokens == 7
    assert read_form(fill_form(defaults, TWO), defaults).to_query(defaults) == ""
