"""Chats: which messages are read, how a chat ends, parts and tool calls, and templates that write the date."""

from __future__ import annotations

from datetime import datetime

import pytest
from helpers.chat_templates import CHATS, LLAMA_3_DATED, chat_tokenizer
from helpers.errors import error_message
from helpers.tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from quarkrl.data.chats import (
    RefusedChat,
    encode_chats,
    find_fault,
    is_dated,
    message_text,
    render_chat,
    with_completion,
    with_fixed_date,
)
from quarkrl.data.encoding import encode_prompts
from quarkrl.data.prompts import load_prompts

USER = {"role": "user", "content": "hi"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"ü": 1}}}]}
TEXTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_chats_as_openai_has_them_are_read(chat):
    prompts = load_prompts([{"messages": chat, "id": 7}])
    assert (prompts.prompts, prompts.columns) == ([chat], {"id": [7]})


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"content": "a"}, "has no role"),
        ({"role": "user"}, "has neither content nor tool_calls"),
        ({"role": "user", "content": None}, "has neither content nor tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "has neither content nor tool_calls"),
        ({"role": "user", "content": {"text": "a"}}, "content {'text': 'a'} is neither text nor a list of text parts"),
        ({"role": "user", "content": ["a"]}, "content ['a'] is neither text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "image_url"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "neither text nor a list of text parts"),
    ],
)
def test_what_a_message_must_not_be(message, fault):
    assert find_fault([USER, USER]) is None
    assert fault in find_fault([USER, message])
    error_message(lambda: load_prompts([{"messages": [USER, message]}]), "malformed chat", fault)


def test_an_empty_chat_is_refused():
    error_message(lambda: load_prompts([{"messages": []}]), "there are no messages")
    error_message(lambda: load_prompts([{"messages": [{"role": "user", "content": []}]}]), "the prompt is empty")


@pytest.mark.parametrize(
    ("chat", "fault"),
    [(None, "it is None"), ([], "there are no messages"), ([{"role": "user"}], "neither content"), ([[]], "no role")],
)
def test_a_malformed_chat_is_one_line_in_python_too(chat, fault):
    error_message(lambda: encode_prompts(chat_tokenizer("ChatML"), [chat]), "must be text or a list of messages", fault)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{{ '%d' % 'a' }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '{a}'.format() }}",
        "{{ x.y }}",
    ],
)
def test_any_error_of_a_template_is_a_refusal(template):
    (refused,) = encode_chats(tiny_tokenizer(chat_template=template), [[USER]])
    assert isinstance(refused, RefusedChat) and refused.reason


def test_a_chat_with_a_word_that_the_tokenizer_does_not_know_is_refused():
    """Without UNK, the tokenizers library raises a bare Exception."""
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{{ messages[0].content }}"
    chats = [[{"role": "user", "content": text}] for text in ("a", "b", "a")]
    known, unknown, again = encode_chats(tokenizer, chats)
    assert known == again == [0] and isinstance(unknown, RefusedChat)


def test_a_reward_token_in_a_tool_call_is_found():
    call = {
        "role": "assistant",
        "content": "x",
        "tool_calls": [{"function": {"name": "f", "arguments": "<|reward_0|>"}}],
    }
    prompts = load_prompts([{"messages": [USER, call, USER]}])
    error_message(
        lambda: prompts.encode(chat_tokenizer("ChatML"), max_length=999, reserved=["<|reward_0|>"]),
        "the prompt contains the reward token <|reward_0|>",
    )


def test_the_text_of_a_message():
    assert message_text(USER) == "hi"
    assert message_text({"role": "user", "content": TEXTS}) == "a\nb"
    assert message_text(CALL) == '[{"function": {"name": "f", "arguments": {"ü": 1}}}]'


def test_a_completion_is_the_next_message_or_continues_the_last_one():
    assert with_completion([USER], "yes") == [USER, {"role": "assistant", "content": "yes"}]
    assert with_completion([USER, {"role": "assistant", "content": "oh "}], "yes")[1:] == [
        {"role": "assistant", "content": "oh yes"}
    ]


def test_a_chat_that_ends_with_the_assistant_is_continued():
    """transformers#33198; the turn stays open, and there is no new generation prompt."""
    tokenizer = chat_tokenizer("ChatML")
    first, second = encode_chats(tokenizer, [[USER, {"role": "assistant", "content": "well,"}], [USER]])
    assert tokenizer.decode(first) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nwell,"
    assert tokenizer.decode(second) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_tool_call_cannot_be_continued():
    tokenizer = chat_tokenizer("Qwen 2.5")
    prompts = load_prompts([{"messages": [USER, CALL]}, {"messages": [USER]}])
    error_message(lambda: prompts.encode(tokenizer, max_length=999), "the chat template refuses", 'no "content"')
    assert prompts.encode(tokenizer, max_length=999, skip_bad=True).skipped == {"refused by the chat template": 1}


@pytest.mark.parametrize("name", ["Llama 3", "Qwen 2.5", "Gemma 3"])
def test_a_rendered_chat_is_the_text_of_its_ids(name):
    tokenizer = chat_tokenizer(name)
    for title in ("several turns", "an unfinished answer", "parts", "unicode"):
        (ids,) = encode_chats(tokenizer, [CHATS[title]])
        assert tokenizer(render_chat(tokenizer, CHATS[title]), add_special_tokens=False)["input_ids"] == ids


def test_a_template_that_reads_only_texts_gets_the_parts_joined():
    for name in ("Llama 3", "ChatML", "Mistral", "macros"):
        tokenizer = chat_tokenizer(name)
        parts, joined = encode_chats(tokenizer, [[{"role": "user", "content": c}] for c in (TEXTS, "a\nb")])
        assert parts == joined


def test_a_template_that_reads_parts_gets_them():
    tokenizer = chat_tokenizer("Gemma 3")
    (ids,) = encode_chats(tokenizer, [[{"role": "user", "content": TEXTS}]])
    assert tokenizer.decode(ids) == "<bos><start_of_turn>user\nab<end_of_turn>\n<start_of_turn>model\n"


def test_null_entries_of_a_message_are_left_out():
    """Parquet gives each message the entries of all."""
    tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}{{ m | list }}{% endfor %}")
    (ids,) = encode_chats(tokenizer, [[{**USER, "name": None, "tool_calls": None}]])
    assert tokenizer.decode(ids) == "['role', 'content']"


def test_named_templates_without_a_default_are_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    error_message(lambda: encode_chats(tokenizer, [[USER]]), "has only the chat templates 'rag', 'tool_use'")


# Dates

DATE = datetime(2026, 3, 4, 5, 6, 7)


def render(template: str, moment: datetime = DATE) -> str:
    tokenizer = with_fixed_date(tiny_tokenizer(chat_template=template), moment)
    return tokenizer.apply_chat_template([USER], tokenize=False)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "04 Mar 2026"),
        ('{{ strftime_now("%A, %-d %B %y, %H:%M") }} %Y', "Wednesday, 4 March 26, 05:06 %Y"),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') | int + 1 }}{% endif %}", "2027"),
        ("{% set f = '%m' %}{% macro m() %}{{ strftime_now(f) }}{% endmacro %}{{ m() }}", "03"),
        ("  {% if true %}x{% endif %}{{ strftime_now('%j') }}\n", "x063"),
        ("\n{{ strftime_now('today') }}", "\ntoday"),
    ],
)
def test_a_template_writes_the_fixed_date(template, text):
    assert render(template) == text


def test_the_date_is_fixed_in_a_copy_and_in_each_named_template():
    tokenizer = tiny_tokenizer()
    templates = {"default": "{{ strftime_now('%Y') }}", "other": "{{ strftime_now('%m') }}", "plain": "x"}
    tokenizer.chat_template = dict(templates)
    fixed = with_fixed_date(tokenizer, DATE)
    rendered = [fixed.apply_chat_template([USER], chat_template=name, tokenize=False) for name in templates]
    assert (rendered, tokenizer.chat_template) == (["2026", "03", "x"], templates)
    assert fixed("a").input_ids == tokenizer("a").input_ids


def test_a_template_is_dated_or_not():
    assert is_dated(tiny_tokenizer(chat_template=LLAMA_3_DATED))
    for tokenizer in (chat_tokenizer("Llama 3"), tiny_tokenizer()):
        assert not is_dated(tokenizer)
        assert with_fixed_date(tokenizer, DATE) is tokenizer


def test_a_dated_template_reads_as_the_plain_one_on_that_day():
    tokenizer = chat_tokenizer("Llama 3, dated")
    (ids,) = encode_chats(with_fixed_date(tokenizer, DATE), [[USER]])
    assert "Date: 04 Mar 2026\n" in tokenizer.decode(ids)
    today = datetime.now()
    chats = [chat for name, chat in CHATS.items() if name != "parts"]
    assert encode_chats(with_fixed_date(tokenizer, today), chats) == encode_chats(tokenizer, chats)
