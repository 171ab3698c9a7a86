"""Rewards: what a scorer returns, to the digit, and what it says when it is used wrongly."""

import asyncio
import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from quarkrl.errors import UserError
from quarkrl.rewards import Classifier, Profanity, Scorer, Vader, resolve

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
TOXICITY, SENTIMENT = MODELS / "toxicity-classifier", MODELS / "sentiment-classifier"
needs_models = pytest.mark.skipif(not TOXICITY.is_dir(), reason="the shared models are not here")

TEXTS = ["a", "bb", "", "dddd"]
PROMPTS = ["p1", "p2", "p3", "p4"]
IDS = [[1], [2, 2], [], [4, 4, 4, 4]]


def length(completions):
    return [len(text) for text in completions]


def score(*rewards, columns=None, **options):
    return Scorer(list(rewards), **options)(PROMPTS, TEXTS, IDS, columns or {})


def error_of(action):
    """The message of the UserError that `action` raises: always one line."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


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


async def slow_length(completions, **columns):
    await asyncio.sleep(0.4)
    return [len(text) for text in completions]


class AsyncObject:
    async def __call__(self, completions):
        await asyncio.sleep(0.4)
        return [10.0] * len(completions)


def test_async_rewards_run_at_the_same_time_and_mix_with_plain_ones():
    start = time.perf_counter()
    scores = score(slow_length, length, AsyncObject(), functools.partial(slow_length))
    assert time.perf_counter() - start < 1.0  # one after another: 1.2
    assert scores.components.tolist() == [[1, 1, 10, 1], [2, 2, 10, 2], [0, 0, 10, 0], [4, 4, 10, 4]]


def test_async_rewards_run_inside_a_running_loop_as_in_a_notebook():
    async def notebook():
        return score(slow_length)

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


# Classifiers ------------------------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(40)]
LONG = " ".join(WORDS * 20)  # 800 tokens


def make_tokenizer(path, *, pad=True, special=True, limit=None):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*names, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if special:
        tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    options = {"pad_token": "[PAD]"} if pad else {}
    if limit is not None:
        options["model_max_length"] = limit
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", eos_token="[SEP]", **options
    ).save_pretrained(path)


SMALL = {
    "vocab_size": 44,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def make_bert(path, *, bias=None, labels=("bad", "good"), seed=0, **config):
    """A tiny BERT; with `bias`, its logits are exactly these for every text."""
    torch.manual_seed(seed)
    settings = {
        **SMALL,
        "initializer_range": 0.5,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    model = BertForSequenceClassification(BertConfig(**settings, **config))
    if bias is not None:
        torch.nn.init.zeros_(model.classifier.weight)
        model.classifier.bias.data = torch.tensor(bias)
    model.save_pretrained(path)
    make_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Logits log 3 and 0 for every text: P(bad) = 3/4, P(good) = 1/4."""
    return make_bert(tmp_path_factory.mktemp("bert"), bias=[math.log(3), 0.0])


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("lively"))


@pytest.mark.parametrize(
    ("label", "reward", "unwanted"),
    [
        ("bad", 0.75, None),
        ("GOOD", 0.25, None),
        (0, 0.75, None),
        ("1", 0.25, None),
        ("not bad", 0.25, "bad"),
        ("not 1", 0.75, "good"),
    ],
)
def test_a_label_by_name_index_or_negation(bert, label, reward, unwanted):
    classifier = Classifier(bert, label)
    assert classifier(["p", "p"], ["w1 w2", ""]) == pytest.approx([reward, reward])
    assert classifier.unwanted == unwanted


def test_a_label_must_be_chosen_and_exist(bert):
    assert "has labels 'bad', 'good': say which by label" in error_of(lambda: Classifier(bert))
    assert "has labels 'bad', 'good'" in error_of(lambda: resolve(str(bert)))
    for label in ("ugly", "not ugly", 2, -1, "nott bad"):
        assert "it has 'bad', 'good'" in error_of(lambda label=label: Classifier(bert, label))


def test_unwanted_has_the_short_name_of_what_is_negated(tmp_path):
    make_bert(tmp_path, labels=("not_toxic", "Toxic", "not ok"))
    assert Classifier(tmp_path, "not toxic").unwanted == "toxicity"
    assert Classifier(tmp_path, "not_toxic", unwanted="toxicity").unwanted == "toxicity"
    assert Classifier(tmp_path, "not ok").unwanted is None  # a label of that very name, not its negation
    scorer = Scorer(resolve(str(tmp_path), label="not toxic"))
    assert scorer.unwanted == "toxicity" and scorer.names == (f"{tmp_path.name}-not-Toxic",)


def test_several_labels_at_once_are_sigmoids(tmp_path):
    make_bert(tmp_path, bias=[math.log(3), 0.0], problem_type="multi_label_classification")
    assert Classifier(tmp_path, "bad")(["p"], ["w1"]) == pytest.approx([0.75])
    assert Classifier(tmp_path, "good")(["p"], ["w1"]) == pytest.approx([0.5])


def test_a_single_output_is_a_reward_models_score_as_it_is(tmp_path):
    make_bert(tmp_path, bias=[-2.5], labels=("LABEL_0",))
    assert Classifier(tmp_path)(["p"], ["w1"]) == pytest.approx([-2.5])
    assert "gives no probability" in error_of(lambda: Classifier(tmp_path, "not LABEL_0"))
    assert "gives no probability" in error_of(lambda: Classifier(tmp_path, unwanted="toxicity"))


def texts_of_many_lengths():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=n)) for n in [3, 0, 17, 1, 60, 5, 2, 200, 9, 600]]


def assert_same_in_any_batch(path, **options):
    texts = texts_of_many_lengths()
    alone = Classifier(path, 1, batch_size=1, **options)(texts, texts)
    assert np.std(alone) > 0.01  # or there would be nothing to see
    for batch_size in (2, 3, 64):
        together = Classifier(path, 1, batch_size=batch_size, **options)(texts, texts)
        np.testing.assert_allclose(together, alone, atol=1e-5)
    backwards = Classifier(path, 1, batch_size=3, **options)(texts, texts[::-1])
    np.testing.assert_allclose(backwards[::-1], alone, atol=1e-5)


def test_scores_do_not_depend_on_the_batch(lively):
    assert_same_in_any_batch(lively)


def make_gpt2(path, **tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=44, n_embd=16, n_layer=2, n_head=2, n_positions=256, initializer_range=0.5, num_labels=2
    )
    GPT2ForSequenceClassification(config).save_pretrained(path)
    make_tokenizer(path, pad=False, special=False, **tokenizer)
    return path


def test_a_decoder_without_a_pad_token_scores_alike_in_any_batch_and_takes_empty_texts(tmp_path):
    assert_same_in_any_batch(make_gpt2(tmp_path))


def test_left_padding_of_the_tokenizers_own_is_not_used_with_absolute_positions(tmp_path):
    make_gpt2(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    assert_same_in_any_batch(tmp_path)


def test_a_text_over_the_limit_is_cut_at_its_end(lively):
    classifier = Classifier(lively, "good")
    assert classifier.identity["max_length"] == 512
    cut = " ".join(LONG.split()[:510])  # [CLS] and [SEP] make 512
    long, same, other = classifier(["p"] * 3, [LONG, cut, "w1 " + cut])
    assert long == pytest.approx(same, abs=1e-6) and abs(long - other) > 1e-6


def test_a_shorter_limit_of_the_users(lively):
    long, same = Classifier(lively, "good", max_length=7)(["p"] * 2, [LONG, " ".join(WORDS[:5])])
    assert long == pytest.approx(same, abs=1e-6)
    for length in (2, 513):
        assert "takes 3 to 512 tokens" in error_of(lambda n=length: Classifier(lively, "good", max_length=n))


def test_the_tokenizers_limit_counts_too(tmp_path):
    make_bert(tmp_path)
    make_tokenizer(tmp_path, limit=96)
    assert Classifier(tmp_path, "good").identity["max_length"] == 96


def test_roberta_positions_start_after_the_padding_index(tmp_path):
    torch.manual_seed(0)
    # 34 rows of positions, of which padding_idx + 1 = 1 is never a token's: 33 tokens, as 514 rows hold 512.
    config = RobertaConfig(
        **SMALL,
        max_position_embeddings=34,
        pad_token_id=0,
        type_vocab_size=1,
        num_labels=2,
        initializer_range=0.5,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    classifier = Classifier(tmp_path, 1)
    assert classifier.identity["max_length"] == 33
    long, same = classifier(["p"] * 2, [LONG, " ".join(WORDS[:31])])
    assert long == pytest.approx(same, abs=1e-6)
    assert_same_in_any_batch(tmp_path)


def test_both_is_prompt_and_completion_and_a_long_prompt_is_cut_first(lively):
    both = Classifier(lively, "good", text="both")
    alone = Classifier(lively, "good")
    assert both(["w1 w2"], [" w3"]) == pytest.approx(alone(["x"], ["w1 w2 w3"]), abs=1e-6)
    tail = " ".join(LONG.split()[-508:])
    assert both([LONG], [" w5 w6"]) == pytest.approx(alone(["x"], [tail + " w5 w6"]), abs=1e-6)
    assert "'completion' or 'both'" in error_of(lambda: Classifier(lively, "good", text="prompt"))


def test_dropout_is_off_and_no_gradient_is_kept(lively):
    classifier = Classifier(lively, "good")
    assert classifier(["p"], ["w1 w2 w3"]) == classifier(["p"], ["w1 w2 w3"])
    assert classifier([], []) == []


def test_identity_of_a_classifier_holds_the_hash_of_its_weights(bert):
    identity = Scorer(resolve(str(bert), label="not bad")).identity[0]
    assert identity["sha256"] == hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    assert identity["model"] == str(bert) and identity["label"] == "not bad" and identity["transformers"]
    json.dumps(identity)


def test_directories_that_hold_no_usable_classifier(tmp_path, bert):
    def copy(name, leave_out):
        (tmp_path / name).mkdir()
        for file in bert.iterdir():
            if not file.name.startswith(leave_out):
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        return tmp_path / name

    load = functools.partial(Classifier, label="bad")
    assert "it has no config.json" in error_of(lambda: load(copy("no-config", "config")))
    assert "holds no safetensors" in error_of(lambda: load(copy("no-weights", "model")))
    assert "has no tokenizer" in error_of(lambda: load(copy("no-tokenizer", "tokenizer")))
    pickled = copy("pickled", "model")
    torch.save({}, pickled / "pytorch_model.bin")
    assert "holds no safetensors" in error_of(lambda: load(pickled))
    broken = copy("broken", "model")
    (broken / "model.safetensors").write_bytes(b"no weights at all")
    assert "cannot load" in error_of(lambda: load(broken))


def test_code_that_comes_with_a_model_is_not_run(tmp_path, bert):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((bert / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\n")
    assert "cannot load" in error_of(lambda: Classifier(tmp_path, "bad"))
    assert not (tmp_path / "ran").exists()


def test_a_language_model_is_not_taken_for_a_classifier_with_a_random_head(tmp_path):
    from transformers import GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=44, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    make_tokenizer(tmp_path, pad=False)
    assert "is no trained sequence classifier: it lacks score.weight" in error_of(lambda: Classifier(tmp_path, 0))


def test_a_device_that_is_not_there(bert):
    assert "cannot run on device banana" in error_of(lambda: Classifier(bert, "bad", device="banana"))


def test_a_cached_model_is_used_when_the_hub_is_away(bert, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    download = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--classifier"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(bert, cached / "snapshots" / revision)
    classifier = Classifier("someone/classifier", "bad")
    assert classifier(["p"], ["w1"]) == pytest.approx([0.75])
    assert classifier.identity["revision"] == revision and classifier.name == "classifier-bad"
    assert classifier.identity["sha256"] == Classifier(bert, "bad").identity["sha256"]


def test_logits_become_what_is_asked_for_whatever_the_config_says(bert, tmp_path):
    """P(bad) is 3/4 by softmax of (log 3, 0); each logit's sigmoid is 3/4 and 1/2."""
    for function, bad, good in (("softmax", 0.75, 0.25), ("sigmoid", 0.75, 0.5), ("none", math.log(3), 0.0)):
        for label, expected in (("bad", bad), ("good", good)):
            assert Classifier(bert, label, function_to_apply=function)(["p"], ["w1"]) == pytest.approx([expected])
    assert Scorer(f"{bert}?label=good&function_to_apply=sigmoid").identity[0]["function"] == "sigmoid"
    make_bert(tmp_path, bias=[math.log(3)], labels=("LABEL_0",))
    assert Classifier(tmp_path, function_to_apply="sigmoid")(["p"], ["w1"]) == pytest.approx([0.75])
    assert "whose softmax is 1" in error_of(lambda: Classifier(tmp_path, function_to_apply="softmax"))
    assert "'softmax', 'sigmoid' or 'none'" in error_of(lambda: Classifier(bert, "bad", function_to_apply="tanh"))


def test_auto_computes_in_float32_on_a_cpu_and_bfloat16_is_near_it(lively):
    texts = texts_of_many_lengths()
    auto, exact, brief = (Classifier(lively, "good", device="cpu", dtype=d) for d in ("auto", "float32", "bfloat16"))
    assert auto.identity["dtype"] == "float32" and brief.identity["dtype"] == "bfloat16"
    assert auto(texts, texts) == exact(texts, texts)
    np.testing.assert_allclose(brief(texts, texts), exact(texts, texts), atol=0.05)
    assert "or 'auto' is wanted" in error_of(lambda: Classifier(lively, "good", dtype="half"))


def test_a_chat_is_read_through_the_models_template(lively, tmp_path):
    chat = [{"role": "user", "content": "w1 w2"}]
    both = Classifier(lively, "good", text="both", name="kind")
    assert "'kind' cannot read chats" in error_of(lambda: both([chat], ["w3"]))
    shutil.copytree(lively, tmp_path / "model")
    template = "{% for message in messages %}{{ message.role[0] }}: {{ message.content }} {% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text("[CLS]" + template + "[SEP]")
    both = Classifier(tmp_path / "model", "good", text="both")
    alone = Classifier(lively, "good")
    found = both([chat, "w1"], ["w3", " w2"])
    assert found == pytest.approx(alone(["x"] * 2, ["u: w1 w2 a: w3", "w1 w2"]), abs=1e-6)


@pytest.mark.parametrize(
    ("spec", "name", "reward", "unwanted", "wanted"),
    [
        ("toxicity?", "toxicity", 0.25, "toxicity", None),
        ("toxicity?label=safe&", "toxicity-safe", 0.25, None, "safe"),
        ("toxicity?label=not 0&name=tox&", "tox", 0.75, "safe", None),
        ("sentiment?label=toxic&", "sentiment-toxic", 0.75, None, "toxic"),
    ],
)
def test_shortcuts_are_classifiers_with_another_model_if_given(tmp_path, spec, name, reward, unwanted, wanted):
    make_bert(tmp_path, bias=[0.0, math.log(3)], labels=("safe", "toxic"))
    scorer = Scorer(f"{spec}model={tmp_path}&batch_size=2")
    assert scorer.names == (name,) and (scorer.unwanted, scorer.wanted) == (unwanted, wanted)
    assert scorer(["p"], ["w1"], [[]]).rewards[0, 0] == pytest.approx(reward)


def test_shortcuts_ask_the_hub_for_the_models_people_use(monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for spec in ("toxicity", "sentiment?revision=main"):
        error_of(lambda spec=spec: resolve(spec))
    sst2 = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
    assert asked == [("s-nlp/roberta_toxicity_classifier", None), (sst2, "main")]


@needs_models
def test_sentiment_steers_either_way():
    texts = ["a wonderful, moving film", "a dull and stupid mess"]
    positive = Scorer(f"sentiment?model={SENTIMENT}")
    negative = Scorer(f"sentiment?model={SENTIMENT}&label=NEGATIVE")
    found = [scorer(texts, texts, texts).rewards[:, 0] for scorer in (positive, negative)]
    np.testing.assert_allclose(found[0] + found[1], 1, atol=1e-6)
    assert found[0][0] > 0.7 and found[1][1] > 0.7
    assert (positive.names, negative.names) == (("sentiment",), ("sentiment-NEGATIVE",))
    assert (positive.wanted, negative.wanted) == ("positive", "negative")


@needs_models
def test_the_toxicity_classifier_tells_insults_from_news():
    texts = [
        "you are a stupid idiot",
        "fuck you asshole, i hate you",
        "what a lovely day",
        "the committee met",
    ]
    scorer = Scorer(resolve(str(TOXICITY), label="not toxic"))
    rewards = scorer(texts, texts, texts).rewards[:, 0]
    assert rewards[:2].max() < 0.15 and rewards[2:].min() > 0.8
    assert scorer.unwanted == "toxicity"
    negated = Classifier(TOXICITY, "nontoxic")(texts, texts)
    np.testing.assert_allclose(rewards, negated)  # two labels: 1 - P(toxic) = P(nontoxic)


@needs_models
def test_the_sentiment_classifier_beats_chance_and_takes_long_texts():
    texts = ["a wonderful, moving film", "a dull and stupid mess", "a wonderful, moving film " * 100]
    good, bad, long = Classifier(SENTIMENT, "positive", device="cpu")(texts, texts)
    assert good > 0.7 and bad < 0.3 and long > 0.7
