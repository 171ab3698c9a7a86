"""From text to token ids: as the tokenizer does it, chats by the chat template, lengths checked."""

from __future__ import annotations

import json

import pytest
from helpers.errors import error_message
from helpers.files import write
from helpers.prompt_helpers import CHAT, byte_tokenizer
from transformers import ByT5Tokenizer

from quarkrl.data.encoding import (
    RefusedChat,
    decode_completions,
    encode_plain_texts,
    encode_prompts,
    try_encode_prompts,
)
from quarkrl.data.prompts import Prompts, load_prompts

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'villain' %}{{ raise_exception('no villains') }}{% endif %}"
    "<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
)


@pytest.mark.parametrize(("special", "first"), [(None, []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", [])])
def test_text_is_tokenised_as_the_tokenizer_does_it_without_a_trailing_eos(special, first):
    tokenizer = byte_tokenizer(special)
    bare = byte_tokenizer()
    prompts = load_prompts([{"prompt": "ab", "n": 1}, {"prompt": "naïve ☃</s>", "n": 2}])
    encoded = prompts.encode(tokenizer, max_length=50)
    # An EOS that the text itself ends with is the user's, and stays.
    assert encoded.ids == [first + bare("ab").input_ids, first + bare("naïve ☃</s>").input_ids]
    assert encoded.ids[1][-1] == tokenizer.eos_token_id
    assert (encoded.prompts, encoded.columns) == (prompts.prompts, {"n": [1, 2]})
    assert prompts.ids == [] and encoded is not prompts
    assert all(type(i) is int for ids in encoded.ids for i in ids)


def test_bos_that_is_also_eos_stays():
    tokenizer = byte_tokenizer("<s> $A")
    tokenizer.eos_token = "<s>"
    assert [len(ids) for ids in load_prompts(["a", "ab"]).encode(tokenizer, max_length=9).ids] == [2, 3]


def test_a_tokenizer_written_in_python():
    assert load_prompts(["ab"]).encode(ByT5Tokenizer(), max_length=9).ids == [[100, 101]]  # no </s>


def test_too_long(tmp_path):
    path = write(tmp_path / "p.txt", "abc\nabcdef\nab\n")
    prompts, tokenizer = load_prompts(path), byte_tokenizer("<s> $A </s>")
    error_message(
        lambda: prompts.encode(tokenizer, max_length=4),
        *("p.txt:2: ", "7 tokens, limit 4", "Shorten", "raise the limit", "--skip_bad_prompts"),
    )
    encoded = prompts.encode(tokenizer, max_length=4, skip_bad=True)  # BOS and 3 letters: the EOS is off
    assert (encoded.prompts, encoded.skipped) == (["abc", "ab"], {"too long": 1})
    assert encoded.locations == [f"{path}:1", f"{path}:3"]
    assert prompts.encode(tokenizer, max_length=7).skipped == {}
    error_message(lambda: prompts.encode(tokenizer, max_length=1, skip_bad=True), "no prompt is left", "3 too long")
    error_message(lambda: prompts.encode(tokenizer, max_length=0), "limit 0: must be at least 1")


def test_skipped_adds_up_over_loading_and_encoding():
    prompts = load_prompts(["", "ab", "abcdef"], skip_bad=True).encode(byte_tokenizer(), max_length=3, skip_bad=True)
    assert prompts.skipped == {"empty prompt": 1, "too long": 1} and prompts.locations == ["row 2 of the list"]
    assert prompts.encode(byte_tokenizer(), max_length=3) == prompts


@pytest.mark.parametrize("special", [None, "<s> $A", "<s> $A </s>"])
def test_a_prompt_of_which_nothing_comes_through(special):
    wrapped = byte_tokenizer(special, lacks="b")
    prompts = load_prompts(["a", "b"])
    error_message(lambda: prompts.encode(wrapped, max_length=9), "row 2 of the list: ", "no tokens")
    assert prompts.encode(wrapped, max_length=9, skip_bad=True).skipped == {"no tokens": 1}


def test_prompts_made_by_hand_are_checked_too():
    prompts = Prompts(["a", "\ud800", ""], {}, ["x:1", "x:2", "x:3"])
    error_message(lambda: prompts.encode(byte_tokenizer(), max_length=9), "x:2: ", "UTF-8")
    encoded = prompts.encode(byte_tokenizer(), max_length=9, skip_bad=True)
    assert encoded.skipped == {"lone surrogate": 1, "empty prompt": 1}
    error_message(lambda: Prompts([], {}, []).encode(byte_tokenizer(), max_length=9), "no prompt is left")


def test_messages_go_through_the_chat_template():
    tokenizer = byte_tokenizer("<s> $A", TEMPLATE)
    prompts = load_prompts([{"prompt": CHAT}, {"prompt": "hi"}, {"prompt": CHAT[1:]}])
    encoded = prompts.encode(tokenizer, max_length=99)
    assert [tokenizer.decode(ids) for ids in encoded.ids] == [
        "<s>system:be kind</s><s>user:hello</s>bot:",  # the template's own BOS, not the tokenizer's as well
        "<s>hi",
        "<s>user:hello</s>bot:",
    ]
    # <s> + 14 letters + </s> + <s> + 10 letters + </s> + "bot:"
    error_message(lambda: prompts.encode(tokenizer, max_length=20), "row 1 of the list: ", "32 tokens, limit 20")
    assert len(prompts.encode(tokenizer, max_length=20, skip_bad=True)) == 2


def test_messages_without_a_chat_template():
    prompts = load_prompts([{"prompt": CHAT}])
    for skip_bad in (False, True):
        error_message(
            lambda skip_bad=skip_bad: prompts.encode(byte_tokenizer(), max_length=99, skip_bad=skip_bad),
            "chat template",
        )


def test_messages_that_the_template_refuses():
    tokenizer = byte_tokenizer(None, TEMPLATE)
    rows = [[{"role": role, "content": "x"}] for role in ("user", "villain", "user", "\ud800", "bot")]
    prompts = load_prompts([{"messages": row} for row in rows])
    error_message(lambda: prompts.encode(tokenizer, max_length=99), "row 2 of the list: ", "no villains")
    encoded = prompts.encode(tokenizer, max_length=99, skip_bad=True)
    assert [tokenizer.decode(ids) for ids in encoded.ids] == ["<s>user:x</s>bot:"] * 2 + ["<s>bot:x</s>bot:"]
    assert encoded.skipped == {"refused by the chat template": 2}


def test_many_texts_are_encoded_in_few_calls_of_the_tokenizer(tmp_path, monkeypatch):
    row = {"prompt": {"text": "He said that the answer was", "toxicity": 0.1}, "id": "x"}
    path = write(tmp_path / "p.jsonl", (json.dumps(row) + "\n") * 20_000)
    tokenizer, sizes = byte_tokenizer(), []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, texts, **how: sizes.append(len(texts)) or call(self, texts, **how)
    )
    assert len(load_prompts(path).encode(tokenizer, max_length=64).ids) == 20_000
    assert sizes == [4096] * 4 + [20_000 - 4 * 4096]


# encode_prompts, which Prompts.encode, QuarkGenerator and perplexity share


def test_texts_and_chats_are_encoded_in_their_order():
    tokenizer = byte_tokenizer("<s> $A </s>", TEMPLATE)
    ids = encode_prompts(tokenizer, ["ab", CHAT[1:], "c"])
    assert [tokenizer.decode(row) for row in ids] == ["<s>ab", "<s>user:hello</s>bot:", "<s>c"]
    assert ids == Prompts(["ab", CHAT[1:], "c"], {}, ["1", "2", "3"]).encode(tokenizer, max_length=99).ids


@pytest.mark.parametrize(("special", "kept"), [(None, []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", [])])
def test_an_empty_text_has_the_given_ids_or_none(special, kept):
    tokenizer = byte_tokenizer(special)
    assert encode_prompts(tokenizer, [""], empty_ids=kept) == [kept]
    assert encode_prompts(tokenizer, [""]) == [[]]


def test_a_refused_chat_is_reported_with_the_reason():
    tokenizer = byte_tokenizer(None, TEMPLATE)
    villain = [{"role": "villain", "content": "x"}]
    assert try_encode_prompts(tokenizer, [villain, "a"]) == [
        RefusedChat("no villains"),
        encode_prompts(tokenizer, ["a"])[0],
    ]
    error_message(lambda: encode_prompts(tokenizer, ["a", villain]), "villain", "no villains")


def test_plain_texts_have_no_special_tokens_and_completions_lose_theirs():
    tokenizer = byte_tokenizer("<s> $A </s>")
    (ids,) = encode_plain_texts(tokenizer, ["a  b ."])
    assert 0 not in ids and 1 not in ids
    assert decode_completions(tokenizer, [[], ids], [[*ids, 1], [1]]) == ["a  b .", ""]
