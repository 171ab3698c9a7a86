"""From completions to figures, with numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.evaluation_helpers import WORDS, NoA, few_b, nll_by_hand
from helpers.tiny_models import tiny_model

from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.panel import Completions, Panel, human_texts
from quarkrl.evaluation.perplexity import PerplexityModel
from quarkrl.rewards import Scorer
from quarkrl.sampling.generator import QuarkGenerator

MODEL = QuarkGenerator(tiny_model("gpt2", WORDS), WORDS, None)
# Two completions of each of two prompts: one that ends with EOS (9), one of EOS alone.
IDS = [[0, 0, 9], [1], [9], [0, 1, 0, 1, 0, 1]]
TEXTS = ["a a", "b", "", "a b a b a b"]


def completions(ids=IDS, texts=TEXTS, prompts=("a b", "c")) -> Completions:
    encoded = load_prompts(list(prompts)).encode(WORDS, max_length=10)
    return Completions(encoded, ids, texts, (9,))


def panel(reward=few_b, **options) -> Panel:
    return Panel(scorer=Scorer(reward), perplexity_model=PerplexityModel(MODEL, MODEL), **{"resamples": 100, **options})


class Half:
    """0.5 for every text, which is 0.5 of something unwanted."""

    unwanted = "halfness"

    def __call__(self, completions, **_):
        return [0.5] * len(completions)


class HasE:
    """The probability of the class "happy": 1 for a text with the word "e"."""

    name, wanted = "happy", "happy"

    def __call__(self, completions, **_):
        return [float("e" in text) for text in completions]


class HasEFromZero(HasE):
    name, wanted_from = "mild", 0.0


def test_each_figure_by_hand():
    measurement = panel(NoA()).measure(completions())
    # The shares of "a" are 1, 0 for the first prompt and 0, 1/2 for the second.
    assert measurement.scores["reward"].tolist() == [[0, 1], [1, 0.5]]
    nll = [nll_by_hand(MODEL.model, [0, 1], [0, 0]), nll_by_hand(MODEL.model, [0, 1], [1])]
    nll.append(nll_by_hand(MODEL.model, [2], IDS[3]))
    expected = {
        "reward": (0 + 1 + 1 + 0.5) / 4,
        "a-ness": (1 + 0 + 0 + 0.5) / 4,
        "average maximum a-ness": (1 + 0.5) / 2,
        "a-ness probability": 2 / 2,  # 0.5 reaches the threshold.
        "a-ness share": (1 / 2 + 1 / 2) / 2,
        "perplexity": np.mean(np.exp([nll[0] / 2, nll[1], nll[2] / 6])),  # A mean over completions.
        "dist-1": (2 / 3 + 2 / 6) / 2,
        "dist-2": (1 / 3 + 2 / 6) / 2,  # "a a"; "a b", "b a".
        "dist-3": (0 / 3 + 2 / 6) / 2,
        "rep-2": 100 * ((1 - 1 / 1) + (1 - 2 / 5)) / 2,  # Two completions have bigrams.
        "rep-3": 100 * (1 - 2 / 4),
        "rep-4": 100 * (1 - 2 / 3),
        "diversity": 2 / 5 * 2 / 4 * 2 / 3,
        "completion length": (3 + 1 + 1 + 6) / 4,  # EOS included.
    }
    assert measurement.figures == pytest.approx(expected, rel=1e-5)
    assert list(measurement.figures) == list(expected)
    assert measurement.left_out == {
        "unscored": 0,
        "perplexity_empty": 1,
        "perplexity_dropped": 0,
        "diversity_short": 3,
    }
    assert measurement.intervals.keys() == expected.keys()


def test_a_completion_without_a_reward_does_not_count():
    measurement = panel(lambda completions, **_: [None, *[0.5] * (len(completions) - 1)]).measure(completions())
    assert measurement.left_out["unscored"] == 1
    assert measurement.figures["reward"] == 0.5


def test_no_reward_at_all_is_an_error():
    with pytest.raises(UserError, match="none of the 4 completions has a reward"):
        panel(lambda completions, **_: [None] * len(completions)).measure(completions())


def test_prompts_without_words_are_counted_and_their_dist_n_is_excluded():
    measurement = panel().measure(completions([[9], [9], [0], [1]], ["", "", "a", "b"]))
    assert measurement.left_out["dist_prompts_without_words"] == 1
    assert measurement.figures["dist-1"] == 1


def test_judges_have_figures_of_their_own_kind():
    judges = {"NoA": Scorer(NoA()), "happy": Scorer(HasE()), "mild": Scorer(HasEFromZero()), "few_b": Scorer(few_b)}
    four = completions([[4, 5], [0], [1, 1], [0]], ["e f", "a", "b b", "a"])
    measurement = panel(few_b, judges=judges).measure(four)
    figures = measurement.figures
    assert figures["happy: happy share"] == figures["happy: score"] == 1 / 4
    assert figures["mild: happy share"] == 1  # Its own threshold is 0.
    assert figures["NoA: average maximum a-ness"] == figures["NoA: a-ness probability"] == 1
    assert figures["NoA: a-ness share"] == 2 / 4
    assert "NoA: score" not in figures  # It is 1 - a-ness.
    assert figures["few_b: score"] == figures["reward"] == -2 / 4
    assert measurement.scores["few_b"].tolist() == measurement.scores["reward"].tolist() == [[0, 0], [-2, 0]]
    assert measurement.left_out["happy: unscored"] == 0


def test_each_of_several_rewards_is_reported():
    measurement = panel([NoA(), few_b]).measure(completions())
    figures = measurement.figures
    assert figures["reward: NoA"] == 0.625 and figures["reward: few_b"] == -4 / 4
    assert figures["reward"] == 0.625 - 1
    assert measurement.scores["reward: few_b"].tolist() == [[0, -1], [0, -3]]


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, 1.0), (0.51, 0.0)])
def test_a_score_equal_to_the_threshold_counts(threshold, expected):
    figures = panel(Half(), threshold=threshold).measure(completions()).figures
    assert figures["halfness probability"] == figures["halfness share"] == expected


def test_a_repeated_completion_of_the_same_prompt_is_scored_once():
    calls = []

    def reward(prompts, completions, completion_ids, topic):
        calls.append(list(zip(prompts, completions, topic, strict=True)))
        return [float(len(ids)) for ids in completion_ids]

    repeated = completions([[0], [0], [1, 1], [0], [0], [0]], ["a", "a", "b b", "a", "a", "a"])
    repeated.prompts.columns["topic"] = ["x", "y"]
    measurement = panel(reward).measure(repeated)
    assert calls == [[("a b", "a", "x"), ("a b", "b b", "x"), ("c", "a", "y")]]
    assert measurement.scores["reward"].tolist() == [[1, 1, 2], [1, 1, 1]]


def test_human_texts_are_strings_or_objects_with_a_text():
    rows = [{"prompt": "a", "human": {"text": "b"}}, {"prompt": "a", "human": "c"}, {"prompt": "a", "human": " "}]
    assert human_texts(load_prompts([*rows, {"prompt": "a"}]), "human") == ["b", "c", None, None]
    with pytest.raises(UserError, match=r"^human_column 'people': .*human"):
        human_texts(load_prompts(rows), "people")
