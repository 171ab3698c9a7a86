"""Prefixes in words: which words, their ids, new tokens that start as them, and the tokenizer that puts them first."""

from __future__ import annotations

import pytest
import torch
from helpers.reward_token_models import add_reward_tokens
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning, new_token_names
from quarkrl.models.words import DEFAULT_WORDS, Words

KINDS = pytest.mark.parametrize("kind", ["text", "soft"])
TEXTS = ["rude: ", "dull ", ""]


def add_words(kind, texts=TEXTS, attributes=("reward",), **tokenizer):
    tokenizer = tiny_tokenizer(**tokenizer)
    model = tiny_model("gpt2", tokenizer)
    words = Words.choose(kind, texts, attributes, len(texts) // len(attributes))
    conditioning, extended = Conditioning.add_to(
        tokenizer, model, len(texts) // len(attributes), attributes, words=words
    )
    return conditioning, extended, model, tokenizer


@pytest.mark.parametrize("reward", DEFAULT_WORDS)
def test_a_common_reward_has_words_for_five_quantiles_and_none_for_the_best(reward):
    (texts,) = Words.choose("text", None, [reward], 5).texts
    assert len(set(texts)) == 5 and texts[-1] == "" and all(text.endswith(".\n") for text in texts[:-1])


@pytest.mark.parametrize(
    ("words", "rewards", "quantiles", "message"),
    [
        (None, ["mine"], 5, "words: must be given for 5 quantiles of mine"),
        (None, ["profanity"], 3, "words: must be given for 3 quantiles of profanity"),
        (["a", "b"], ["mine"], 3, "words: must be 3 texts, one for each quantile, worst first; there are 2"),
        (["a", "b"], ["mine", "other"], 2, "one for each quantile of each of 2 rewards, worst first; there are 2"),
        (["a", "b", "a"], ["mine"], 3, "words 'a': must differ"),
        (["a", "b", "", ""], ["mine", "other"], 2, "words '': must differ"),
        (["a", "b", "a", "b"], ["mine", "other"], 2, "words: must differ between rewards, and two have 'a'"),
        (None, ["profanity", "perspective"], 5, "words: must differ between rewards"),
    ],
)
def test_words_that_do_not_fit_the_quantiles_are_refused(words, rewards, quantiles, message):
    with pytest.raises(UserError, match=message):
        Words.choose("text", words, rewards, quantiles)


def test_a_newline_can_be_written_as_in_a_shell():
    given = ["rude.\\n", "plain.\n", ""]
    assert Words.choose("text", given, ["mine"], 3).texts == (("rude.\n", "plain.\n", ""),)


def test_words_that_the_tokenizer_cannot_tell_apart_are_refused():
    tokenizer = tiny_tokenizer()
    words = Words("text", (("a", "b"),))
    assert words.encode(tokenizer) == (((64,), (65,)),)

    class Deaf:
        def encode(self, text, add_special_tokens):
            return [0]

    with pytest.raises(UserError, match="must have different token ids"):
        words.encode(Deaf())


def test_text_adds_no_token_and_no_row():
    conditioning, extended, model, tokenizer = add_words("text")
    assert len(extended) == len(tokenizer) == len(model.get_input_embeddings().weight) == conditioning.vocab_size
    expected = tuple(tuple(tokenizer.encode(text)) for text in TEXTS)
    assert conditioning.prefixes == (expected,) and conditioning.in_words is conditioning
    assert conditioning.new_token_ids == conditioning.token_names == []
    assert conditioning.max_length == len(tokenizer.encode("rude: "))


def test_soft_tokens_start_as_words_and_mean_the_same():
    conditioning, extended, model, tokenizer = add_words("soft")
    count = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert conditioning.new_token_ids == list(range(257, 257 + count)) and conditioning.vocab_size == 257
    words = Words.choose("soft", TEXTS, ["reward"], 3)
    assert extended.convert_ids_to_tokens(conditioning.new_token_ids) == conditioning.token_names
    assert new_token_names(tokenizer, ["reward"], words) == conditioning.token_names
    prompt = tokenizer.encode("hello")
    for quantile in range(3):
        with torch.no_grad():
            soft = model(torch.tensor([conditioning.prefix(prompt, [quantile])])).logits[0, -1, :257]
            text = model(torch.tensor([tokenizer.encode(TEXTS[quantile]) + prompt])).logits[0, -1, :257]
        torch.testing.assert_close(soft, text)
    assert conditioning.in_words.prefix(prompt, [0]) == tokenizer.encode("rude: ") + prompt


@KINDS
def test_the_inverse_of_prefix(kind):
    conditioning, _, _, tokenizer = add_words(kind, ["rude ", "dull ", "kind "])
    prompt = tokenizer.encode("rude hello")
    for quantile in range(3):
        ids = conditioning.prefix(prompt, [quantile])
        if kind == "soft" or quantile == 2:
            assert conditioning.strip(ids) == prompt and conditioning.is_prefixed(ids)
        else:  # Words are a part of the text, unless the tokenizer in final/ has put them there.
            assert conditioning.strip(ids) == ids and not conditioning.is_prefixed(ids)
    assert conditioning.strip(prompt) == prompt and not conditioning.is_prefixed(prompt)


@KINDS
def test_the_steered_tokenizer_puts_nothing_first_where_the_best_quantile_has_no_words(kind, tmp_path):
    conditioning, extended, _, tokenizer = add_words(kind, chat_template=True, bos=True)
    conditioning.steer_tokenizer(extended).save_pretrained(tmp_path)
    steered = AutoTokenizer.from_pretrained(tmp_path)
    assert steered("hello")["input_ids"] == tokenizer("hello")["input_ids"]
    chat = [{"role": "user", "content": "hello"}]
    plain = tokenizer.apply_chat_template(chat, tokenize=False)
    assert steered.apply_chat_template(chat, tokenize=False) == plain
    worst = steered.apply_chat_template(chat, tokenize=False, quantile="worst")
    start = tokenizer.bos_token if plain.startswith(tokenizer.bos_token) else ""
    text = "rude: " if kind == "text" else "".join(conditioning.token_names[: len("rude: ")])
    assert worst == start + text + plain.removeprefix(start)
    assert steered.apply_chat_template(chat, tokenize=False, quantile=2) == plain
    with pytest.raises(Exception, match="quantile: must be one of best, worst, 0, 1, 2"):
        steered.apply_chat_template(chat, tokenize=False, quantile=3)


@KINDS
def test_the_steered_tokenizer_puts_words_behind_bos(kind, tmp_path):
    conditioning, extended, _, tokenizer = add_words(kind, ["rude: ", "kind: "], bos=True)
    conditioning.steer_tokenizer(extended).save_pretrained(tmp_path)
    steered = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("hello")["input_ids"]
    expected = [ids[0], *conditioning.ids_of([1]), *ids[1:]]
    assert steered("hello")["input_ids"] == conditioning.prefix(ids, [1]) == expected


@KINDS
def test_a_conditioning_in_words_is_saved_and_loaded(kind, tmp_path):
    conditioning, *_ = add_words(kind, ["x", "yy", "a", ""], ("first", "second"))
    conditioning.save(tmp_path)
    assert Conditioning.load(tmp_path) == conditioning
    assert conditioning.ids_of((1, 0)) == [*conditioning.prefixes[0][1], *conditioning.prefixes[1][0]]


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    conditioning, *_ = add_reward_tokens()
    old = '{"attributes": ["reward"], "token_ids": [[257, 258, 259]], "prefix_ids": [], "vocab_size": 257}'
    (tmp_path / "quark.json").write_text('{"conditioning": ' + old + "}")
    assert Conditioning.load(tmp_path) == conditioning
