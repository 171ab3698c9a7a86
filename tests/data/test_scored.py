"""Scored samples: completions as the token ids that a sampler makes, and what is skipped, truncated or refused."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.kinds_of_tokenizers import llama_tokenizer, t5_tokenizer, wordpiece_tokenizer
from helpers.tiny_models import tiny_tokenizer
from transformers import AutoTokenizer

from quarkrl.builtin import model_path
from quarkrl.data.encoding import decode_completions
from quarkrl.data.prompts import load_prompts
from quarkrl.data.scored import Ends, ScoredSamples, check_scored, distinct_prompts
from quarkrl.errors import UserError

BYTES = tiny_tokenizer()  # A token per byte; EOS is 256.
EOS = 256
CHATS = tiny_tokenizer(chat_template="{% for m in messages %}{{ m.role[0] }}:{{ m.content | trim }};{% endfor %}a:")


def samples_of(rows, tokenizer=BYTES, columns=("reward",), skip_bad=False, **ends) -> ScoredSamples:
    """Encode rows as a run does: at most 6 tokens with EOS, unless `ends` say otherwise."""
    eos = tokenizer.eos_token_id
    settings = {"max_length": 6, "min_length": 1, "of_text": eos, "of_chat": eos, "all_ids": [eos]} | ends
    prompts = check_scored(load_prompts(rows, skip_bad=skip_bad), columns, skip_bad)
    return ScoredSamples.encode(prompts.encode(tokenizer, max_length=64), tokenizer, Ends(**settings))


def row(completion="ab", reward=1.0, prompt="x"):
    return {"prompt": prompt, "completion": completion, "reward": reward}


def test_a_completion_ends_with_eos_unless_the_limit_cuts_it_off():
    texts = ["abc", "abcde", "abcdef", "abcdefgh"]
    samples = samples_of([row(text, reward) for reward, text in enumerate(texts)])
    bytes_of = [list(text.encode()) for text in texts]
    ids = BYTES("abcdef")["input_ids"]
    assert samples.completions == [[*ids[:3], EOS], [*ids[:5], EOS], ids, ids]
    assert samples.rewards.tolist() == [[0], [1], [2], [3]] and len(bytes_of[3]) == 8
    assert "4 samples of 1 prompts" in samples.note
    assert "1 completions are cut off at 6 tokens (--max_completion_length)" in samples.note


def test_eos_is_learned_where_the_sampler_may_end():
    samples = samples_of([row("a"), row("abc")], min_length=2)
    assert [ids[-1] == EOS for ids in samples.completions] == [False, True]
    assert "1 are shorter than --min_completion_length 2, so their EOS is not learned" in samples.note
    never = samples_of([row("a"), row("abc")], min_length=6)
    assert not any(EOS in ids for ids in never.completions) and "shorter" not in never.note


def test_eos_in_a_text_ends_it_and_is_not_doubled():
    spelled = samples_of([row("ab<eos>"), row("a<eos>b")])
    assert spelled.completions == samples_of([row("ab")]).completions
    assert "skipped: 1 with EOS in the middle" in spelled.note


def test_an_empty_completion_is_only_an_eos_or_skipped():
    assert samples_of([row("")], min_length=0).completions == [[EOS]]
    assert "skipped: 1 empty" in samples_of([row(""), row()]).note


@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, llama_tokenizer(), llama_tokenizer("first"), t5_tokenizer(), AutoTokenizer.from_pretrained(model_path())],
    ids=["bytes", "always", "first", "t5", "builtin"],
)
def test_prompt_and_completion_have_the_ids_of_the_whole_text_and_decode_to_it(tokenizer):
    text = "You are nice a b c. You are mean"
    whole = tokenizer(text)["input_ids"]
    for middle in range(2, len(whole) - 1):
        prompt = tokenizer.decode(whole[:middle], skip_special_tokens=True)
        start = tokenizer(prompt)["input_ids"]
        samples = samples_of([row(text[len(prompt) :], prompt=prompt)], tokenizer, max_length=99)
        (ids,) = samples.completions
        assert ids[-1] == tokenizer.eos_token_id and samples.prompts.ids == [start]
        assert decode_completions(tokenizer, [start], [ids]) == [text[len(prompt) :]]
        if start == whole[:middle]:
            assert ids[:-1] == whole[middle:]


def test_a_completion_that_ends_a_word_of_the_prompt_continues_its_ids():
    tokenizer = llama_tokenizer()
    samples = samples_of([row("n", prompt="mea"), row(" a", prompt="mea")], tokenizer)
    texts = decode_completions(tokenizer, samples.prompts.ids, samples.completions)
    assert texts == ["n", " a"]


def test_a_text_that_the_tokenizer_cannot_write_behind_the_prompt_is_skipped():
    samples = samples_of([row("icely", prompt="n"), row(" mean", prompt="nice")], wordpiece_tokenizer())
    assert len(samples) == 1 and "skipped: 1 that the tokenizer cannot write" in samples.note


def test_completions_of_chats_are_messages():
    chat = [{"role": "user", "content": "hi"}]
    message = [{"role": "assistant", "content": "yes"}]
    samples = samples_of([row("yes", prompt=chat), row(message, prompt=chat)], CHATS)
    assert samples.completions == [[*CHATS("yes")["input_ids"], EOS]] * 2
    as_json = '[{"role": "user", "content": "hi"}]'  # As `quarkrl samples --json` prints it.
    assert samples_of([row("yes", prompt=as_json)], CHATS).prompts.ids == samples.prompts.ids[:1]


def test_rewards_are_numbers_and_rows_without_one_are_skipped():
    values = [1, "0.5", True, None, "", float("nan"), "inf", -2.5]
    samples = samples_of([row(reward=value) for value in values])
    assert samples.rewards[:, 0].tolist() == [1.0, 0.5, 1.0, -2.5]
    assert "skipped: 4 without a reward" in samples.note
    with pytest.raises(UserError, match=r"row 1 of the list: reward is 'good'\. Use a number"):
        samples_of([row(reward="good")])
    assert "1 no number as reward" in samples_of([row(reward="good"), row()], skip_bad=True).note


def test_each_reward_has_a_column_where_other_commands_write_it():
    plain = {"prompt": "x", "completion": "ab", "kind": 1, "short": 2}
    scored = {"prompt": "x", "completion": "ab", "reward": 3, "scores": {"kind": 1, "short": 2}}
    flat = {"prompt": "x", "completion": "ab", "reward": 3, "score.kind": 1, "score.short": 2}
    for one in (plain, scored, flat):
        assert samples_of([one], columns=("kind", "short")).rewards.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x", "text": "a", "reward": 1}], "must have a column 'completion' beside the prompt"),
        ([{"prompt": "x", "completion": "a", "score": 1}], "must have a column 'reward' beside the prompt"),
        ([{"completion": "a", "reward": 1}], "there is no column 'prompt'"),
        ([row(completion=None)], "row 1 of the list: the completion is None"),
        ([row(completion=3)], "row 1 of the list: the completion is 3"),
        ([row(completion="\ud800")], "half a character"),
        ([row(reward=None)], "no sample is left (rows skipped: 1 without a reward)"),
        ([row("")], "no sample is left (rows skipped: 1 empty)"),
        ([], "there are no rows"),
    ],
)
def test_bad_data_is_one_line(rows, message):
    with pytest.raises(UserError) as raised:
        samples_of(rows)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_each_prompt_of_samples_counts_once():
    samples = samples_of([row("a"), row("b"), row("c", prompt="y")])
    prompts = distinct_prompts(samples.prompts)
    assert prompts.prompts == ["x", "y"] and prompts.columns == {}
    assert np.isfinite(samples.rewards).all()
