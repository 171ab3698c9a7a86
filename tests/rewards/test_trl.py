"""TRL 1.16's calling convention, and the rewards that ship with TRL, unchanged."""

from __future__ import annotations

import json

import pytest
from helpers.eight_letters import PROMPTS
from helpers.errors import error_message
from helpers.reward_helpers import IDS, TEXTS, score
from helpers.runs import figures_of, small_trainer
from helpers.tiny_models import tiny_tokenizer
from transformers import TrainerState

from quarkrl.cli.main import main
from quarkrl.rewards import Scorer, Vader
from quarkrl.storage.parquet import read_table

SHORT = {"num_iterations": 1, "steps_per_iteration": 1, "per_device_train_batch_size": 2}
CHATS = [[{"role": "user", "content": text}] for text in "abcd"]


def message(text):
    return [{"role": "assistant", "content": text}]


def logs_lengths(completions, completion_ids, log_extra=None, log_metric=None, **kwargs):
    """Log a column in one call and a metric in two."""
    log_extra("ids", [str(ids) for ids in completion_ids])
    for value in (1, 3):
        log_metric("level", value)
    return [float(len(text)) + ids[0] for text, ids in zip(completions, completion_ids, strict=True)]


def test_completions_of_chats_are_messages_and_those_of_texts_are_texts():
    seen = []

    def reward(completions, **kwargs):
        seen.append(completions)
        return [0.0] * len(completions)

    Scorer(reward)([CHATS[0], "b", CHATS[2], "d"], TEXTS, IDS)
    assert seen == [[message("a"), "bb", message(""), "dddd"]]
    reward.completions_as_text = True
    Scorer(reward)(CHATS, TEXTS, IDS)
    assert seen[1] == TEXTS


def test_built_in_rewards_read_the_text_of_a_chat():
    pytest.importorskip("vaderSentiment")
    texts = ["good", "bad", "", "fine"]
    in_chats = Scorer(Vader())(CHATS, texts, IDS).rewards
    assert in_chats.tolist() == Scorer(Vader())(list("abcd"), texts, IDS).rewards.tolist()


def test_two_stars_receive_the_state_and_the_functions_that_log():
    def reward(prompts, **kwargs):
        assert kwargs.keys() == {"completions", "completion_ids", "topic", "trainer_state", "log_extra", "log_metric"}
        return [kwargs["trainer_state"].global_step] * len(prompts)

    scorer = Scorer(reward)
    columns = {"topic": [0] * 4, "trainer_state": [0] * 4}  # A column of this name is hidden, as in TRL.
    assert scorer(list("abcd"), TEXTS, IDS, columns).rewards[0, 0] == 0
    assert scorer(list("abcd"), TEXTS, IDS, columns, trainer_state=TrainerState(global_step=7)).rewards[0, 0] == 7


def test_a_reward_knows_the_step_of_the_trainer(tmp_path):
    steps = []

    def reward(completion_ids, trainer_state):
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        return [float(sum(ids)) for ids in completion_ids]

    small_trainer(tmp_path, reward, **{**SHORT, "num_iterations": 2, "steps_per_iteration": 3}).train()
    assert steps == [(0, 6), (3, 6)]


def test_a_column_of_a_reward_is_in_the_pool_and_the_mean_of_a_metric_in_the_log(tmp_path):
    def drops_one(completion_ids):
        return [None, *(1.0 for _ in completion_ids[1:])]

    options = {**SHORT, "generation_batch_size": 4, "on_collapse": "warn"}
    small_trainer(tmp_path, [logs_lengths, drops_one], **options).train()
    table, _ = read_table(tmp_path / "pool/iteration-000000.parquet")
    assert len(table) == len(PROMPTS) - 2  # One of each batch has no reward.
    assert table["extra.ids"].to_pylist() == [str(ids) for ids in table["completion_ids"].to_pylist()]
    assert figures_of(tmp_path, "metric.level") == [2.0]


def test_a_resumed_exploration_has_the_columns_and_metrics_of_finished_batches(tmp_path):
    class Fails:
        calls = 0

        def __call__(self, completion_ids, log_extra, log_metric):
            self.calls += 1
            if self.calls == 2:
                raise KeyError("no such")
            log_metric("call", self.calls)
            log_extra("call", [self.calls] * len(completion_ids))
            return [float(sum(ids)) for ids in completion_ids]

    options = {**SHORT, "generation_batch_size": 4}
    trainer = small_trainer(tmp_path, reward := Fails(), **options)
    assert "no such" in error_message(trainer.train)
    small_trainer(tmp_path, reward, **options).train(resume_from_checkpoint=True)
    table, _ = read_table(tmp_path / "pool/iteration-000000.parquet")
    assert table["extra.call"].to_pylist() == ["1"] * 4 + ["3"] * 4
    assert figures_of(tmp_path, "metric.call") == [2.0]


def test_columns_of_two_rewards_have_two_names_and_other_values_become_json():
    def first(completions, log_extra):
        for text in completions:
            log_extra("x", [text or None])
        return [0.0] * 4

    def second(completions, log_extra):
        log_extra("x", [1, [2], {"a": 3}, 4.5])
        return [0.0] * 4

    assert score(first, second).extra == {"x": ["a", "bb", None, "dddd"], "x-2": ["1", "[2]", '{"a": 3}', "4.5"]}


def test_a_column_without_a_value_for_each_completion_is_refused():
    def reward(completions, log_extra):
        log_extra("x", [1, 2, 3])
        return [0.0] * 4

    assert error_message(lambda: score(reward)) == (
        "reward 'reward' log_extra 'x': must have 4 values, one per completion, not 3."
    )


def test_a_cached_score_logs_nothing(tmp_path):
    def reward(completions, log_extra):
        log_extra("length", [len(text) for text in completions])
        return [0.0] * len(completions)

    reward.identity = {"version": 1}
    reward.reads = ("completions",)
    scorer = Scorer(reward, cache=tmp_path / "c")
    assert scorer(list("abcd"), TEXTS, IDS).extra == {"length": ["1", "2", "0", "4"]}
    assert scorer(list("abcd"), ["a", "ccc", "bb", "ccc"], IDS).extra == {"length": [None, None, None, "3"]}


def test_score_prints_what_a_reward_logs(tmp_path, capsys):
    (tmp_path / "rewards.py").write_text(
        "def reward(completions, log_extra, log_metric):\n"
        "    log_extra('length', [len(text) for text in completions])\n"
        "    log_metric('mean', sum(map(len, completions)) / len(completions))\n"
        "    return [0.0] * len(completions)\n",
        encoding="utf-8",
    )
    (tmp_path / "texts.txt").write_text("a\nbbb\n", encoding="utf-8")
    assert main(["score", str(tmp_path / "texts.txt"), "--reward", f"{tmp_path}/rewards.py:reward", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["extra"] for line in out.splitlines()] == [{"length": "1"}, {"length": "3"}]
    assert "2 texts, 0 without a reward, mean 2.0000;" in err


# Special tokens


def with_answer_tags():
    """A tokenizer whose words "a" and "b" are special tokens, as answer tags may be."""
    tokenizer = tiny_tokenizer(words=[*"abcdefgh"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["a", "b"]})
    return tokenizer


@pytest.mark.parametrize("keep", [False, True])
def test_special_tokens_reach_a_reward_if_that_is_wanted(tmp_path, keep):
    tokenizer, texts = with_answer_tags(), {}

    def reward(completions, completion_ids):
        texts.update({tuple(ids): text for text, ids in zip(completions, completion_ids, strict=True)})
        return [float(sum(ids)) for ids in completion_ids]

    options = {**SHORT, "processing_class": tokenizer, "keep_special_tokens": keep, "min_completion_length": 0}
    trainer = small_trainer(tmp_path, reward, **options)
    trainer.explore(0)
    assert any(0 in ids or 1 in ids for ids in texts) and any(9 in ids for ids in texts)
    for ids, text in texts.items():
        words = ["abcdefgh"[i] if i < 8 else "<unk>" for i in ids if i != 9]
        assert text.split() == [word for word in words if keep or word not in ("a", "b", "<unk>")]
    trainer.quantize(0)
    config = json.loads((trainer.save_final() / "quark.json").read_text())["config"]
    assert config["keep_special_tokens"] is keep


# The rewards that ship with TRL


def test_rewards_of_trl_run_unchanged(tmp_path):
    rewards = pytest.importorskip("trl.rewards")
    texts = ["<think>a</think>b", "<think>a", "c", "<think></think>"]
    ids = [[1] * 90, [5] * 5, [1, 2, 3, 4], [1] * 120]
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    repetition = rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    scores = Scorer([rewards.think_format_reward, overlong, repetition], condition_on="each")(CHATS, texts, ids)
    assert scores.components[:, 0].tolist() == [1, 0, 0, 1]
    assert scores.components[:, 1].tolist() == [-0.5, 0, 0, -1]
    assert scores.components[1:3, 2].tolist() == [-0.75, 0]
    chats = [{"prompt": [{"role": "user", "content": text}], "solution": "1"} for text in PROMPTS]
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = tiny_tokenizer(words=[*"abcdefgh"], chat_template=template)
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=6, soft_punish_cache=5)
    options = {**SHORT, "processing_class": tokenizer, "on_collapse": "warn"}
    small_trainer(tmp_path, [rewards.think_format_reward, overlong], prompts=chats, **options).train()


def test_trls_accuracy_rewards_run_unchanged():
    """They use Math-Verify, whose time-outs need the main thread; TRL switches them off in any other."""
    rewards = pytest.importorskip("trl.rewards")
    pytest.importorskip("math_verify")
    texts = [r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", "c", r"\boxed{2}"]
    columns = {"solution": [r"$\frac{1}{3}$", r"$\frac{1}{3}$", r"$\frac{1}{3}$", "not a formula"]}
    cosine = rewards.get_cosine_scaled_reward(max_len=100)
    scorer = Scorer([rewards.accuracy_reward, cosine], condition_on="each")
    scores = scorer(CHATS, texts, [[1] * 50] * 4, columns)
    assert scores.components[:3].tolist() == [[1, 0.75], [0, -0.75], [0, -0.75]]
    assert scores.extra["solution"] == columns["solution"] and scores.extra.keys() >= {"gold_parsed", "answer_parsed"}
