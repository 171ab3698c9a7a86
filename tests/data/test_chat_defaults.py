"""A system prompt and arguments of the chat template, which the template itself holds."""

from __future__ import annotations

import pytest
from helpers.chat_templates import CHAT_TEMPLATES, CHATML, chat_tokenizer
from helpers.errors import error_message
from helpers.tiny_models import tiny_tokenizer

from quarkrl.data.chat_defaults import read_template_kwargs, with_chat_defaults
from quarkrl.data.chats import render_chat

TEXT = 'Be "brief" {% x %}\n{{ y }}'
SYSTEM = {"role": "system", "content": TEXT}
USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES.keys() - {"Gemma 2", "Llama 3, dated"}))
def test_a_system_prompt_is_the_system_message_of_chats_without_one(name):
    plain = chat_tokenizer(name)
    tokenizer = with_chat_defaults(plain, TEXT)
    assert render_chat(tokenizer, [USER]) == render_chat(plain, [SYSTEM, USER])
    own = [{"role": "system", "content": "own"}, USER]
    assert render_chat(tokenizer, own) == render_chat(plain, own)
    assert plain.chat_template == CHAT_TEMPLATES[name][0]


def test_a_template_that_refuses_or_ignores_system_messages_is_a_mistake():
    error_message(lambda: with_chat_defaults(chat_tokenizer("Gemma 2"), "x"), "system_prompt 'x'", "no system message")
    ignoring = tiny_tokenizer(chat_template="{{ messages[-1].content }}")
    error_message(lambda: with_chat_defaults(ignoring, "x"), "the chat template ignores system messages")
    error_message(lambda: with_chat_defaults(tiny_tokenizer(), "x"), "--system_prompt", "has no chat template")


def test_arguments_of_the_template_are_defaults():
    plain = chat_tokenizer("Qwen 3")
    tokenizer = with_chat_defaults(plain, template_kwargs='{"enable_thinking": false}')
    thoughtless = plain.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert thoughtless.endswith("<think>\n\n</think>\n\n")
    assert render_chat(tokenizer, [USER]) == thoughtless
    thinking = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert thinking == render_chat(plain, [USER])
    # The last defaults count: those of a command beat those of training.
    again = with_chat_defaults(tokenizer, template_kwargs={"enable_thinking": True})
    assert render_chat(again, [USER]) == render_chat(plain, [USER])


def test_values_of_any_type_reach_the_template():
    value = {"a": [1, -2.5, True, None, 'x"{{ y }}'], "ü": {}}
    tokenizer = tiny_tokenizer(chat_template="{{ value | tojson }}")
    expected = '{"a": [1, -2.5, true, null, "x\\"{{ y }}"], "ü": {}}'
    assert render_chat(with_chat_defaults(tokenizer, template_kwargs={"value": value}), [USER]) == expected


def test_each_named_template_gets_the_defaults():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "other": "{{ messages[0].content }}"}
    changed = with_chat_defaults(tokenizer, "S")
    assert changed.apply_chat_template([USER], chat_template="other", tokenize=False) == "S"
    assert tokenizer.chat_template["other"] == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "must be a JSON object"),
        ("[1]", "chat_template_kwargs [1]: must be a JSON object"),
        ({"tools": []}, "'tools': must be a variable of the chat template"),
        ({"a b": 1}, "'a b': must be a variable"),
        ({"x": float("nan")}, "nan: must hold values that JSON has"),
        ({"x": {1, 2}}, "must hold values that JSON has"),
    ],
)
def test_what_arguments_must_not_be(value, words):
    error_message(lambda: read_template_kwargs(value), words, "enable_thinking")


def test_an_argument_that_the_template_does_not_read_names_the_nearest_one():
    error_message(
        lambda: with_chat_defaults(chat_tokenizer("Qwen 3"), template_kwargs={"enable_thinkin": False}),
        "'enable_thinkin': must be a variable that the chat template reads",
        "Did you mean 'enable_thinking'?",
    )
