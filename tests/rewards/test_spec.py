"""A reward's spec with options, `NAME?option=value&option=value`: what it makes, and what it says to mistakes."""

import pytest
from helpers.scoring import error_of, make_bert

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


def test_options_are_the_constructors_arguments():
    spec = f"{LOCAL}&attribute=INSULT&queries_per_second=10&concurrency=3&languages=en,de&timeout=7"
    made = Perspective("INSULT", "http://127.0.0.1:9/x", 10.0, 3, ["en", "de"], 7.0)
    reward = resolve(spec)
    assert reward.identity == made.identity and reward.identity["languages"] == ["en", "de"]
    assert (reward._endpoint._interval, reward._endpoint._concurrency, reward._endpoint._timeout) == (0.1, 3, 7.0)
    assert resolve(f"{LOCAL}&queries_per_second=none")._endpoint._interval == 0.0


def test_options_of_a_name_that_sets_some_itself():
    pytest.importorskip("vaderSentiment")
    assert resolve("vader?negative=true")(["bad"]) == resolve("vader-negative")(["bad"]) == [0.5423]
    assert resolve("vader?negative=False")(["bad"]) == [-0.5423]
    assert "has no option 'negative': it has none" in error_of(lambda: resolve("vader-negative?negative=false"))


def test_options_of_a_classifier_by_its_directory(here):
    make_bert(here / "bert")
    reward = resolve("./bert?label=not+bad&text=both&max_length=16&batch_size=2")
    assert reward.identity["label"] == "not bad" and reward.identity["text"] == "both"
    assert reward.identity["max_length"] == 16 and reward.unwanted == "bad"
    assert resolve("bert?label=1").identity["label"] == "good"
    # The spec's own goes before what is said for all.
    assert resolve("./bert?label=good", label="bad").identity["label"] == "good"
    assert resolve("./bert?unwanted=rage", label="not bad").unwanted == "rage"
    (here / "bert").rename(here / "bert?label=x")
    assert resolve("./bert?label=x", label="bad").identity["label"] == "bad"  # a directory of that very name


def test_options_of_a_function(here):
    assert rewards("ours.py:short") == [1, 1, 0]
    assert rewards("ours.py:short?limit=1") == [1, 0, 0]
    assert rewards("ours.py:short?limit=3&exact=true&factor=0.5") == [0, 0.5, 0]
    assert rewards("ours.py:short?words=x,y,z&limit=0") == [3, 3, 3]
    assert rewards("ours:undefined?limit=8") == [8, 8, 8]  # its annotation names nothing; its default is an int
    assert rewards("ours.py:optional?score=7") == [7, 7, 7]
    assert str(rewards("ours.py:optional?score=none")) == "[nan, nan, nan]"
    one, two = (Scorer(f"ours.py:short?limit={n}").identity[0] for n in (1, 2))
    assert one != two and one["name"] == "short"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (f"{LOCAL}&atribute=INSULT", "has no option 'atribute': did you mean 'attribute'? (it has attribute, endpoint"),
        (f"{LOCAL}&color=red", "has no option 'color': it has attribute, endpoint"),
        (f"{LOCAL}&concurrency=many", "concurrency is 'many': a whole number is wanted"),
        (f"{LOCAL}&concurrency=1.5", "concurrency is '1.5': a whole number is wanted"),
        (f"{LOCAL}&queries_per_second=fast", "queries_per_second is 'fast': a number is wanted"),
        (f"{LOCAL}&timeout=inf", "timeout is 'inf': a number is wanted"),
        (f"{LOCAL}&timeout=none", "timeout is 'none': a number is wanted"),
        (f"{LOCAL}&attribute=", "attribute is empty"),
        (f"{LOCAL}&attribute=A&attribute=B", "option 'attribute' is given twice"),
        ("perspective?INSULT", "'INSULT' is no list of options: write option=value&option=value"),
        ("perspektive?attribute=INSULT", "did you mean 'perspective'?"),
        ("profanity?level=3", "has no option 'level': it has none"),
        ("vader?negative=1", "negative is '1': true or false is wanted"),
        ("judge", "reward 'judge' needs endpoint, model, rubric: write 'judge?endpoint=…&model=…&rubric=…'"),
        ("./nowhere?label=x", "reward './nowhere': there is no such directory"),
        ("bert?text=prompt&label=bad", "text is 'prompt': 'completion' or 'both' is wanted"),
        ("bert?labl=bad", "did you mean 'label'?"),
        ("bert?model=other", "has no option 'model'"),
        ("ours.py:short?limit=x", "reward 'ours.py:short': limit is 'x': a whole number is wanted"),
        ("ours.py:short?limt=1", "did you mean 'limit'?"),
        ("ours.py:short?completions=a", "has no option 'completions'"),
    ],
)
def test_mistakes_are_one_line(spec, said, here):
    (here / "bert").mkdir()  # empty: the options are looked at first
    assert said in error_of(lambda: resolve(spec))


def test_arguments_for_classifiers_are_refused_by_others(here):
    for spec in (LOCAL, "ours.py:short", "ours.py:short?limit=1"):
        assert "is no classifier: leave label out" in error_of(lambda spec=spec: resolve(spec, label="x"))
        assert "is no classifier: leave unwanted out" in error_of(lambda spec=spec: resolve(spec, unwanted="x"))
        resolve(spec, device="cpu")  # may be given to all alike
