"""Rewards: what a scorer returns, to the digit, and what it says when it is used wrongly."""

import asyncio
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers.scoring import error_of
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from quarkrl.errors import UserError
from quarkrl.rewards import Profanity, Scorer, Vader, resolve

TEXTS = ["a", "bb", "", "dddd"]
PROMPTS = ["p1", "p2", "p3", "p4"]
IDS = [[1], [2, 2], [], [4, 4, 4, 4]]


def length(completions):
    return [len(text) for text in completions]


def score(*rewards, columns=None, **options):
    return Scorer(list(rewards), **options)(PROMPTS, TEXTS, IDS, columns or {})


# Calling ----------------------------------------------------------------------------------------------------


def test_one_reward_gives_one_column_of_numbers():
    scores = score(length)
    assert scores.rewards.tolist() == [[1.0], [2.0], [0.0], [4.0]]
    assert scores.components.tolist() == scores.rewards.tolist()
    assert scores.rewards.dtype == np.float64


def test_a_single_callable_need_not_be_in_a_list():
    assert Scorer(length)(PROMPTS, TEXTS, IDS).rewards[:, 0].tolist() == [1, 2, 0, 4]


def test_a_reward_is_given_prompts_completions_ids_and_the_data_sets_columns():
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [0.0] * len(prompts)

    score(reward, columns={"topic": ["w", "x", "y", "z"]})
    assert seen == {
        "prompts": PROMPTS,
        "completions": TEXTS,
        "completion_ids": IDS,
        "topic": ["w", "x", "y", "z"],
    }


def test_a_reward_is_given_only_what_it_accepts():
    def of_topic(topic, *, factor=10):
        return [factor * t for t in topic]

    scores = score(of_topic, columns={"topic": [1, 2, 3, 4], "other": list("abcd")})
    assert scores.rewards[:, 0].tolist() == [10, 20, 30, 40]


def test_a_reward_that_asks_for_a_column_that_is_not_there_is_told_what_is():
    message = error_of(lambda: score(lambda completions, topik: [0] * 4, columns={"topic": [1, 2, 3, 4]}))
    assert "asks for 'topik'" in message and "topic, prompts, completions, completion_ids" in message


def test_no_completions_give_empty_arrays_and_call_nothing():
    def never(completions):
        raise AssertionError

    scores = Scorer([never, never], condition_on="each")([], [], [], {})
    assert scores.rewards.shape == scores.components.shape == (0, 2)


# Several rewards --------------------------------------------------------------------------------------------


def test_a_sum_is_weighted_and_components_are_not():
    def ones(completions):
        return [1.0] * len(completions)

    scores = score(length, ones, weights=[0.5, -2])
    assert scores.components.tolist() == [[1, 1], [2, 1], [0, 1], [4, 1]]
    assert scores.rewards.tolist() == [[-1.5], [-1.0], [-2.0], [0.0]]  # 0.5 · length - 2


def test_the_terms_of_a_sum_go_by_name_where_there_are_several():
    scores = score(length, length, weights=[1, 3])
    assert {name: values.tolist() for name, values in scores.terms.items()} == {
        "length": [1, 2, 0, 4],
        "length-2": [1, 2, 0, 4],
    }
    assert score(length).terms == score(length, length, condition_on="each").terms == {}


def test_eos_is_told_to_a_reward_that_asks_for_it_and_to_no_other():
    def of_eos(completion_ids, end_ids):
        return [sum(i in end_ids for i in ids) for ids in completion_ids]

    def of_all(**given):
        return [len(given)] * 4

    scores = Scorer([of_eos, of_all])(PROMPTS, TEXTS, IDS, {"topic": [0] * 4}, end_ids=[4, 1])
    assert scores.components.tolist() == [[1, 4], [0, 4], [0, 4], [4, 4]]


def test_each_keeps_every_reward_as_an_attribute_of_its_own():
    scorer = Scorer([length, lambda completions: [7] * len(completions)], condition_on="each")
    assert scorer.attributes == scorer.names == ("length", "lambda")
    assert scorer(PROMPTS, TEXTS, IDS, {}).rewards.tolist() == [[1, 7], [2, 7], [0, 7], [4, 7]]
    assert Scorer([length, length]).attributes == ("reward",)


def test_names_are_unique_and_fit_into_a_token():
    class Named:
        name = "Être <kind>|really"

        def __call__(self, completions):
            return length(completions)

    assert Scorer([length, length, Named(), functools.partial(length)]).names == (
        "length",
        "length-2",
        "tre-kind-really",
        "length-3",
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, "1 weights are given for 2 rewards"),
        ({"weights": [1.0, math.nan]}, "weight nan is not a finite number"),
        ({"weights": [1.0, "2"]}, "weight '2' is not a finite number"),
        ({"weights": [1, 1], "condition_on": "each"}, "condition_on='each' makes none"),
        ({"condition_on": "all"}, "'sum' or 'each' is wanted"),
    ],
)
def test_options_that_do_not_fit(options, said):
    assert said in error_of(lambda: Scorer([length, length], **options))


def test_no_reward_at_all():
    assert "no reward is given" in error_of(lambda: Scorer([]))


# What comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_missing_score_is_nan_and_so_is_its_sum_even_with_weight_zero(missing):
    scores = score(length, lambda completions: [5, missing, 6, 7], weights=[1, 0])
    assert np.isnan(scores.components).tolist() == [
        [False, False],
        [False, True],
        [False, False],
        [False, False],
    ]
    assert np.isnan(scores.rewards[:, 0]).tolist() == [False, True, False, False]
    assert scores.rewards[[0, 2, 3], 0].tolist() == [1, 0, 4]


@pytest.mark.parametrize(
    "result",
    [
        [1, 2, 0, 4],
        (1.0, 2.0, 0.0, 4.0),
        np.array([1, 2, 0, 4], dtype=np.float32),
        torch.tensor([1.0, 2.0, 0.0, 4.0], requires_grad=True),
        [torch.tensor(1.0), np.float16(2), False, np.int64(4)],
        np.array([1, 2.0, np.bool_(False), 4], dtype=object),
    ],
)
def test_numbers_come_as_lists_arrays_tensors_scalars_and_truth_values(result):
    assert score(lambda completions: result).rewards[:, 0].tolist() == [1, 2, 0, 4]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([1, 2, 3], "returned 3 scores for 4 completions"),
        (None, "returned None: a list of 4 numbers is wanted"),
        (0.5, "returned 0.5 (of type float)"),
        ("1234", "returned '1234' (of type str)"),
        ({"a": 1}, "(of type dict)"),
        ([1, 2, "good", 4], "returned 'good' (of type str) at index 2"),
        ([1, [2], 3, 4], "returned [2] (of type list) at index 1"),
        (torch.zeros(4, 1), "returned [0.0] (of type list) at index 0"),
        ([1, 2, 3, 1j], "returned 1j (of type complex) at index 3"),
    ],
)
def test_what_is_not_one_number_each_is_an_error_that_names_reward_index_and_value(result, said):
    def my_reward(completions):
        return result

    message = error_of(lambda: score(my_reward))
    assert said in message and "reward 'my_reward'" in message


def test_an_exception_in_a_reward_is_one_line_with_its_place_and_its_cause():
    def broken(completions):
        raise KeyError("no such\nword")

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(UserError) as caught:
        score(broken)
    assert str(caught.value) == f"reward 'broken' raised KeyError: 'no such\\nword' ({__file__}:{line})"
    assert isinstance(caught.value.__cause__, KeyError)


def test_ctrl_c_in_a_reward_is_not_swallowed():
    def interrupted(completions):
        raise KeyboardInterrupt

    async def interrupted_later(completions):
        raise KeyboardInterrupt

    for reward in (interrupted, interrupted_later):
        with pytest.raises(KeyboardInterrupt):
            score(reward)


# Async ------------------------------------------------------------------------------------------------------


def test_async_rewards_run_at_the_same_time_and_mix_with_plain_ones():
    under_way = []

    async def all_begun():
        under_way.append(1)
        while len(under_way) < 3:  # one after another, the first would wait in vain
            await asyncio.sleep(0.01)

    async def late_length(completions, **columns):
        await all_begun()
        return [len(text) for text in completions]

    class AsyncObject:
        async def __call__(self, completions):
            await all_begun()
            return [10.0] * len(completions)

    scores = score(late_length, length, AsyncObject(), functools.partial(late_length))
    assert scores.components.tolist() == [[1, 1, 10, 1], [2, 2, 10, 2], [0, 0, 10, 0], [4, 4, 10, 4]]


def test_async_rewards_run_inside_a_running_loop_as_in_a_notebook():
    async def late_length(completions):
        await asyncio.sleep(0.01)
        return [len(text) for text in completions]

    async def notebook():
        return score(late_length)

    assert asyncio.run(notebook()).rewards[:, 0].tolist() == [1, 2, 0, 4]


def test_a_client_that_an_async_reward_keeps_lives_through_all_calls():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    scorer = Scorer(reward)
    scorer(PROMPTS, TEXTS, IDS)
    scorer(PROMPTS, TEXTS, IDS)
    assert loops[0] is loops[1] and not loops[0].is_closed()


def test_an_error_in_an_async_reward_is_told_alike_and_stops_the_others():
    stopped = []

    async def endless(completions):
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(True)

    async def broken(completions):
        raise ValueError("quota")

    start = time.perf_counter()
    assert "reward 'broken' raised ValueError: quota (" in error_of(lambda: score(endless, broken))
    assert stopped == [True] and time.perf_counter() - start < 10


def test_a_call_in_another_thread_can_be_ended_and_the_next_one_works():
    class Slow:
        seconds = 60.0

        async def __call__(self, completions):
            await asyncio.sleep(self.seconds)
            return [1.0] * len(completions)

    reward = Slow()
    scorer = Scorer(reward)
    scorer.stop()  # Nothing runs: nothing is ended, now or later.
    for _ in range(2):
        reward.seconds = 60.0
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(scorer, PROMPTS, TEXTS, IDS)
            while not future.done():
                time.sleep(0.02)
                scorer.stop()
        assert future.exception() is not None
        reward.seconds = 0.0
        assert scorer(PROMPTS, TEXTS, IDS).rewards[:, 0].tolist() == [1, 1, 1, 1]


# Names, files, modules --------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_callable_is_taken_as_it_is():
    assert resolve(length) is length


def test_a_function_of_a_file_with_its_neighbour(here):
    (here / "neighbour_a.py").write_text("FACTOR = 3\n")
    code = "from neighbour_a import FACTOR\n\ndef triple(completions):\n"
    code += "    return [FACTOR * len(c) for c in completions]\n"
    (here / "mine.py").write_text(code)
    reward = resolve("mine.py:triple")
    assert Scorer(reward)(PROMPTS, TEXTS, IDS).rewards[:, 0].tolist() == [3, 6, 0, 12]
    assert resolve(str(here / "mine.py") + ":triple") is reward  # one file, one module
    (here / "mine.py").write_text(code.replace("len(c)", "(1 + len(c))"))
    assert Scorer("mine.py:triple")(PROMPTS, TEXTS, IDS).rewards[0, 0] == 6.0  # an edit is seen


def test_a_function_of_a_module_in_the_current_directory(here):
    (here / "my_package").mkdir()
    (here / "my_package" / "rewards.py").write_text(
        "class Rewards:\n    @staticmethod\n    def good(prompts):\n        return [1] * len(prompts)\n"
    )
    assert Scorer("my_package.rewards:Rewards.good")(PROMPTS, TEXTS, IDS).rewards.sum() == 4


def test_what_cannot_be_loaded(here):
    (here / "mine.py").write_text("def kindness(completions): ...\nNUMBER = 3\nclass Kind: ...\n")
    (here / "broken.py").write_text("import nothing_of_the_kind\n")
    (here / "wrong.py").write_text("def f(:\n")
    (here / "leaves.py").write_text("raise SystemExit(3)\n")
    for spec, said in {
        "absent.py:f": "there is no file 'absent.py'",
        "mine.py": "names no function: write file.py:function",
        "mine.py:kindnes": "mine.py has no 'kindnes'; did you mean 'kindness'?",
        "mine.py:xyz": "it has kindness",
        "mine.py:NUMBER": "is of type int: a function is wanted",
        "mine.py:Kind": "is a class: give an object of it, Kind(…)",
        "mine:xyz": "mine has no 'xyz'; it has kindness",
        "broken.py:f": "cannot import broken.py: ModuleNotFoundError: No module named 'nothing_of_the_kind'",
        "broken:f": "cannot import module 'broken': ModuleNotFoundError: No module named 'nothing_of",
        "wrong.py:f": "cannot import wrong.py: SyntaxError: ",
        "leaves.py:f": "cannot import leaves.py: SystemExit: 3",
        "absent_module.part:f": "there is no module 'absent_module'",
        "profnity": "did you mean 'profanity'? (known: ",
        "Vader": "did you mean 'vader'?",
        "vader_negative": "did you mean 'vader-negative'?",
        "./no/such/model": "there is no such directory",
        "": "the reward's name is empty",
    }.items():
        assert said in error_of(lambda spec=spec: resolve(spec)), spec
    assert f"({here / 'broken.py'}:1)" in error_of(lambda: resolve("broken.py:f"))
    assert "is of type int" in error_of(lambda: resolve(3))
    assert "is a class" in error_of(lambda: resolve(Profanity))
    assert "no classifier: leave label out" in error_of(lambda: resolve("vader", label="positive"))


def test_a_model_that_the_hub_does_not_have_and_a_hub_that_is_away(monkeypatch):
    def refuse(error):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))

    assert "no model on the Hugging Face hub" in error_of(lambda: resolve("not a name!"))  # so not asked for
    refuse(RepositoryNotFoundError("404", response=Mock()))
    assert "no model on the Hugging Face hub" in error_of(lambda: resolve("nobody/nothing-at-all"))
    refuse(GatedRepoError("403", response=Mock()))
    assert "is gated: ask for access" in error_of(lambda: resolve("nobody/nothing-at-all"))
    refuse(ConnectionError("no route"))
    assert "cannot be had from the Hugging Face hub (ConnectionError: no route" in error_of(
        lambda: resolve("nobody/nothing-at-all")
    )


def test_identity_tells_functions_apart_and_is_json():
    def other(completions):
        return [0] * len(completions)

    first, second = Scorer([length, other], weights=[1, 2]).identity
    assert first["name"] == first["qualname"] == "length" and first["module"] == __name__
    source = "def length(completions):\n    return [len(text) for text in completions]\n"
    assert first["sha256"] == hashlib.sha256(source.encode()).hexdigest() != second["sha256"]
    assert (first["weight"], second["weight"]) == (1.0, 2.0)
    assert json.loads(json.dumps([first, second])) == [first, second]
    half, third = (Scorer(functools.partial(length, x=x)).identity[0] for x in (1 / 2, 1 / 3))
    assert half != third


def test_identity_of_an_object_is_its_own_and_must_be_json():
    class Mine:
        name, identity = "mine", {"model": "m", "version": 3}

        def __call__(self, completions):
            return length(completions)

    assert Scorer(Mine()).identity == [{"name": "mine", "model": "m", "version": 3, "weight": 1.0}]
    Mine.identity = {"model": object()}
    assert "cannot be written as JSON" in error_of(lambda: Scorer(Mine()))


def test_unwanted_is_known_for_a_single_unweighted_probability():
    pytest.importorskip("profanity_check")
    assert Scorer("profanity").unwanted == "toxicity"
    assert Scorer("profanity", weights=[2]).unwanted is None
    assert Scorer(["profanity", length]).unwanted is None
    assert Scorer(length).unwanted is None


# Profanity and VADER ----------------------------------------------------------------------------------------


def test_profanity_is_one_minus_the_packages_probability():
    predict_prob = pytest.importorskip("profanity_check").predict_prob
    texts = ["have a nice day", "you are a fucking idiot", ""]
    rewards = Scorer("profanity")(texts, texts, texts).rewards[:, 0]
    np.testing.assert_allclose(rewards, 1 - predict_prob(texts))
    assert rewards[0] > 0.9 and rewards[1] < 0.01 and 0 <= rewards[2] <= 1
    assert Profanity()([]) == []
    assert set(Profanity().identity) == {"name", "alt-profanity-check", "scikit-learn"}


def test_vader_is_the_compound_score_and_its_negative():
    pytest.importorskip("vaderSentiment")
    texts = ["good", "bad", "", "the table"]
    # The lexicon gives good 1.9 and bad -2.5; compound is v / sqrt(v² + 15).
    assert Vader()(texts) == [0.4404, -0.5423, 0.0, 0.0]
    assert resolve("vader-negative")(texts) == [-0.4404, 0.5423, 0.0, 0.0]
    assert Scorer("vader-negative").names == ("vader-negative",)
    assert Scorer("vader").unwanted is None


@pytest.mark.parametrize(("name", "module"), [("profanity", "profanity_check"), ("vader", "vaderSentiment")])
def test_an_extra_that_is_not_installed(name, module, monkeypatch):
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    assert 'pip install "quarkrl[offline]"' in error_of(lambda: resolve(name))


def test_importing_rewards_does_not_import_the_extras():
    code = "import sys, quarkrl.rewards; print({'profanity_check', 'vaderSentiment'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert shown.stdout.strip() == "set()"
