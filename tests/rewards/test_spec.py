"""Rewards with options, `NAME?option=value&option=value`: how values are converted, and which errors mistakes get."""

import pytest
from helpers.errors import error_message
from helpers.reward_helpers import make_bert

from quarkrl.rewards import Perspective, Scorer, resolve

LOCAL = "perspective?endpoint=http://127.0.0.1:9/x"
CODE = """
from __future__ import annotations
from typing import Optional

def optional(completions, score: Optional[int] = 1):
    return [score] * len(completions)

def short(completions, limit: int = 3, factor=1.0, exact: bool = False, words: list[str] = (), mode=None, **columns):
    return [factor * (len(c) == limit if exact else len(c) <= limit) + len(words) for c in completions]

def undefined(completions, limit: Nothing = 3):
    return [limit] * len(completions)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
    (tmp_path / "ours.py").write_text(CODE)
    return tmp_path


def rewards(spec, texts=("a", "bcd", "efghi")):
    texts = list(texts)
    return Scorer(spec)(texts, texts, [[]] * len(texts), {"limit_of_row": [1] * len(texts)}).rewards[:, 0].tolist()


def test_options_are_arguments_of_the_class():
    spec = f"{LOCAL}&attribute=INSULT&queries_per_second=10&concurrency=3&languages=en,de&timeout=7"
    made = Perspective("INSULT", "http://127.0.0.1:9/x", 10.0, 3, ["en", "de"], 7.0)
    reward = resolve(spec)
    assert reward.identity == made.identity and reward.identity["languages"] == ["en", "de"]
    assert reward.limits == made.limits
    assert (reward.limits.queries_per_second, reward.limits.concurrency, reward.limits.timeout) == (10.0, 3, 7.0)
    assert resolve(f"{LOCAL}&queries_per_second=none").limits.queries_per_second is None


def test_a_name_that_sets_an_option_does_not_accept_it():
    pytest.importorskip("vaderSentiment")
    assert resolve("vader?negative=true")(["bad"]) == resolve("vader-negative")(["bad"]) == [0.5423]
    assert resolve("vader?negative=False")(["bad"]) == [-0.5423]
    assert "option 'negative': must be unset" in error_message(lambda: resolve("vader-negative?negative=false"))


def test_a_directory_accepts_the_options_of_a_classifier(here):
    make_bert(here / "bert")
    reward = resolve("./bert?label=not+bad&text=both&max_length=16&batch_size=2")
    assert reward.identity["label"] == "not bad" and reward.identity["text"] == "both"
    assert reward.identity["max_length"] == 16 and reward.unwanted == "bad"
    assert resolve("bert?label=1").identity["label"] == "good"
    # An option of the spec overrides the argument.
    assert resolve("./bert?label=good", label="bad").identity["label"] == "good"
    assert resolve("./bert?unwanted=rage", label="not bad").unwanted == "rage"
    (here / "bert").rename(here / "bert?label=x")
    assert resolve("./bert?label=x", label="bad").identity["label"] == "bad"  # A directory of that name.


def test_options_are_converted_to_the_types_of_a_functions_parameters(here):
    assert rewards("ours.py:short") == [1, 1, 0]
    assert rewards("ours.py:short?limit=1") == [1, 0, 0]
    assert rewards("ours.py:short?limit=3&exact=true&factor=0.5") == [0, 0.5, 0]
    assert rewards("ours.py:short?words=x,y,z&limit=0") == [3, 3, 3]
    assert rewards("ours:undefined?limit=8") == [8, 8, 8]  # Its annotation names nothing; its default is an int.
    assert rewards("ours.py:optional?score=7") == [7, 7, 7]
    assert str(rewards("ours.py:optional?score=none")) == "[nan, nan, nan]"
    one, two = (Scorer(f"ours.py:short?limit={n}").identity[0] for n in (1, 2))
    assert one != two and one["name"] == "short"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (f"{LOCAL}&atribute=INSULT", "option 'atribute': must be one of attribute, endpoint, "),
        (f"{LOCAL}&color=red", "option 'color': must be one of attribute, endpoint, "),
        (f"{LOCAL}&concurrency=many", "concurrency 'many': must be an integer"),
        (f"{LOCAL}&concurrency=1.5", "concurrency '1.5': must be an integer"),
        (f"{LOCAL}&queries_per_second=fast", "queries_per_second 'fast': must be a number"),
        (f"{LOCAL}&timeout=inf", "timeout 'inf': must be a number"),
        (f"{LOCAL}&timeout=none", "timeout 'none': must be a number"),
        (f"{LOCAL}&attribute=", "attribute '': must be a name"),
        (f"{LOCAL}&attribute=A&attribute=B", "option 'attribute': must not be repeated"),
        ("perspective?INSULT", "options 'INSULT': must be option=value&option=value"),
        ("perspektive?attribute=INSULT", "Did you mean 'perspective'?"),
        ("profanity?level=3", "option 'level': must be unset"),
        ("vader?negative=1", "negative '1': must be true or false"),
        ("judge", "options endpoint, model, rubric: must be set. Write 'judge?endpoint=…&model=…&rubric=…'"),
        ("./nowhere?label=x", "reward './nowhere': must be an existing directory"),
        ("bert?text=prompt&label=bad", "text 'prompt': must be 'completion' or 'both'"),
        ("bert?labl=bad", "Did you mean 'label'?"),
        ("bert?model=other", "option 'model': must be one of label, "),
        ("ours.py:short?limit=x", "reward 'ours.py:short' limit 'x': must be an integer"),
        ("ours.py:short?limt=1", "Did you mean 'limit'?"),
        ("ours.py:short?completions=a", "option 'completions': must be one of limit, "),
    ],
)
def test_a_mistake_is_an_error_of_one_line(spec, expected, here):
    (here / "bert").mkdir()  # Empty: the options are checked first.
    assert expected in error_message(lambda: resolve(spec))


def test_arguments_for_classifiers_are_refused_by_other_rewards(here):
    for spec in (LOCAL, "ours.py:short", "ours.py:short?limit=1"):
        assert "label 'x': must be unset" in error_message(lambda spec=spec: resolve(spec, label="x"))
        assert "unwanted 'x': must be unset" in error_message(lambda spec=spec: resolve(spec, unwanted="x"))
        resolve(spec, device="cpu")  # May be given for all rewards together.
