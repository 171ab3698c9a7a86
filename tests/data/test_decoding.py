"""From token ids to completions as text: what the completion adds to the prompt's text."""

from __future__ import annotations

import random
from itertools import chain

import pytest
from helpers.kinds_of_tokenizers import llama_tokenizer, t5_tokenizer, wordpiece_tokenizer
from helpers.random_tokenizers import random_tokenizer
from helpers.tiny_models import tiny_tokenizer

from quarkrl.data.encoding import decode_completions, encode_as_text

KINDS = {
    "llama": llama_tokenizer(),
    "llama, first": llama_tokenizer("first"),
    "llama, never": llama_tokenizer("never"),
    "t5": t5_tokenizer(),
    "wordpiece": wordpiece_tokenizer(),
    "byte level": tiny_tokenizer(bos=True),
    "words": tiny_tokenizer(words=["a", "b", "c"]),
}


def ids_of(tokenizer, *tokens):
    return tokenizer.convert_tokens_to_ids(list(tokens))


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_are_the_text_of_both(kind):
    """For random completions of whole-character prompts, and for special tokens in either."""
    tokenizer, rng = KINDS[kind], random.Random(kind)
    ids = [i for i in range(len(tokenizer)) if kind != "byte level" or i < 95 or i >= 256]
    ids = [i for i in ids if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
    prompts = [tokenizer("a b")["input_ids"] + rng.choices(ids, k=3) for _ in range(40)]
    completions = [rng.choices(ids, k=rng.randrange(6)) for _ in range(40)]
    for prompt, row, text in zip(
        prompts, completions, decode_completions(tokenizer, prompts, completions), strict=True
    ):
        assert decode(tokenizer, prompt) + text == decode(tokenizer, prompt + row)


@pytest.mark.parametrize("seed", range(40))
def test_random_tokenizers_decode_both_and_read_special_tokens_as_text(seed):
    tokenizer, texts = random_tokenizer(f"texts {seed}")
    rng = random.Random(seed)
    try:
        prompts = [ids for ids in tokenizer(texts)["input_ids"] if ids]
    except Exception:  # noqa: BLE001 - what `tokenizers` raises for unknown characters without UNK
        return
    completions = [rng.choices(list(tokenizer.get_vocab().values()), k=4) for _ in prompts]
    for prompt, row, text in zip(
        prompts, completions, decode_completions(tokenizer, prompts, completions), strict=True
    ):
        assert decode(tokenizer, prompt) + text == decode(tokenizer, prompt + row)
    special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special_ids -= {tokenizer.unk_token_id}
    assert not special_ids.intersection(chain(*encode_as_text(tokenizer, texts, add_special_tokens=False)))


@pytest.mark.parametrize("kind", ["llama", "llama, first", "t5"])
def test_a_completion_keeps_its_leading_space(kind):
    tokenizer = KINDS[kind]
    prompt = tokenizer("You are")["input_ids"]
    completions = [ids_of(tokenizer, "▁nice", "."), ids_of(tokenizer, "b"), ids_of(tokenizer, "▁", "▁a"), []]
    texts = decode_completions(tokenizer, [prompt] * 4, completions)
    assert texts == [" nice.", "b", "  a", ""]


def test_a_word_that_the_prompt_began_is_continued():
    tokenizer = KINDS["wordpiece"]
    prompt = tokenizer("nice")["input_ids"]
    completions = [ids_of(tokenizer, *row) for row in (["##ly", "a"], ["a", "."])]
    assert decode_completions(tokenizer, [prompt] * 2, completions) == ["ly a", " a."]


def test_special_tokens_are_left_out_wherever_they_are():
    tokenizer = KINDS["llama"]
    prompt = ids_of(tokenizer, "<s>", "▁You", "</s>", "<s>", "▁are", "</s>")
    completion = ids_of(tokenizer, "▁nice", "</s>", "▁a", "</s>")
    assert decode_completions(tokenizer, [prompt, [1]], [completion] * 2) == [" nice a", "nice a"]


@pytest.mark.parametrize("clean_up", [True, False])
def test_spaces_before_punctuation_are_the_model_s_own(clean_up):
    tokenizer = tiny_tokenizer(words=["a", ".", "n't"], clean_up_tokenization_spaces=clean_up)
    assert decode_completions(tokenizer, [[0]], [[1, 2, 1]]) == [" . n't ."]


@pytest.mark.parametrize(("kind", "stray_byte"), [("llama", "<0xFF>"), ("byte level", "ÿ")])
def test_a_character_of_several_bytes_belongs_to_what_ends_it(kind, stray_byte):
    tokenizer = KINDS[kind]
    start = tokenizer("a")["input_ids"]
    snowman = tokenizer("☃")["input_ids"][-3:]
    # Within the completion, from the prompt on, and broken off.
    prompts = [start, start + snowman[:1], start + snowman[:2], start]
    completions = [snowman, snowman[1:], snowman[2:], snowman[:2]]
    *whole, broken = decode_completions(tokenizer, prompts, completions)
    assert whole == ["☃"] * 3 and set(broken) == {"\ufffd"}
    # A byte that makes the prompt's own character unreadable does not put the prompt into the completion.
    stray = [tokenizer.convert_tokens_to_ids(stray_byte)]
    assert decode_completions(tokenizer, [start + snowman], [stray]) == ["\ufffd"]
