"""Chat templates that put reward tokens first by themselves.

A steered template renders the same text as before, with the reward tokens in front, or behind the BOS with which the
text starts. Its argument `quantile` (best, worst or a number) selects other reward tokens. It is plain Jinja, so each
program that reads chat templates can render it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

# Encloses what `{% generation %}` encloses. Unicode reserves these characters, so a text does not contain them.
_MARK = "\ufdd0quark\ufdd1"


def steer_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    start_ids: Sequence[int],
    choices: Mapping[str, str],
) -> Any:
    """Return the chat template of a tokenizer, or all of them by name, with reward tokens first.

    Args:
        tokenizer: knows the tokens of the prefixes.
        prefix: the text of the prefix, such as reward tokens; the default.
        start_ids: the special tokens that the prefix follows where a chat starts with them, such as BOS.
        choices: the texts of all prefixes, by the value of the template's argument `quantile`.

    Returns:
        A template, a dict of named templates, or what the tokenizer has instead of them.
    """
    templates = tokenizer.chat_template
    if not templates:
        return templates
    head = _prefix(prefix, choices) + _head(tokenizer, start_ids)
    if isinstance(templates, str):
        return _steer(templates, head)
    return {name: _steer(template, head) for name, template in templates.items()}


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token with which the chat template ends a message of the assistant; None if it has none.

    It can be another token than EOS: `<|im_end|>` in a model whose EOS is `<|endoftext|>`.
    """
    probe = "quark"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # noqa: BLE001 - there is no template, or it raises what its author wrote
        return None
    rest = text.rpartition(probe)[2].lstrip()
    specials = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [name for name in specials if rest.startswith(name)]
    return specials[max(ends, key=len)] if ends else None


def _steer(template: str, head: str) -> str:
    """A template that renders the same text behind `quark_head`, which `head` sets and which may replace the start."""
    # transformers' Jinja environment drops the newline behind a tag, blanks before a tag, and the newline that ends the
    # template. So the old template starts on its own line, and its final newline is removed. The empty expression keeps
    # the blanks before the closing tag; llama.cpp does not know {%+, which does that too.
    body = re.sub(r"(\r\n|\r|\n)\Z", "", template)
    marked = _mark_generation(body)
    if marked is None:
        return "{% set quark_text %}\n" + body + "{{ '' }}{% endset %}" + head + "{{ quark_head + quark_rest }}"
    return (
        "{% set quark_mark = " + _quote(_MARK) + " %}"
        "{% macro quark_generation() %}{{ quark_mark + caller() + quark_mark }}{% endmacro %}"
        "{% set quark_text %}\n" + marked + "{{ '' }}{% endset %}"
        "{% set quark_parts = quark_text.split(quark_mark) %}{% set quark_text = quark_parts | join %}" + head +
        # transformers takes the position of `{% generation %}` from what is written so far, and a block that is
        # assigned to a variable writes nothing. So each part is written by itself, without what the head replaces.
        "{{ quark_head }}{% set quark = namespace(skip=quark_text | length - quark_rest | length) %}"
        "{% for quark_part in quark_parts %}"
        "{% if loop.index0 is odd %}{% generation %}{{ quark_part[quark.skip:] }}{% endgeneration %}"
        "{% else %}{{ quark_part[quark.skip:] }}{% endif %}"
        "{% set quark.skip = [quark.skip - quark_part | length, 0] | max %}"
        "{% endfor %}"
    )


def _prefix(prefix: str, choices: Mapping[str, str]) -> str:
    """Jinja that sets `quark_prefix`; it fails at an unknown quantile."""
    refusal = _quote(f"quantile: must be one of {', '.join(choices)}.")
    names = "[" + ", ".join(map(_quote, choices)) + "]"
    table = "{" + ", ".join(f"{_quote(name)}: {_quote(text)}" for name, text in choices.items()) + "}"
    return (
        "{% set quark_prefix = " + _quote(prefix) + " %}"
        "{% if quantile is defined and quantile is not none %}"
        "{% if (quantile | string) not in " + names + " %}{{ raise_exception(" + refusal + ") }}{% endif %}"
        "{% set quark_prefix = (" + table + ")[quantile | string] %}"
        "{% endif %}"
    )


def _head(tokenizer: PreTrainedTokenizerBase, start_ids: Sequence[int]) -> str:
    """Jinja that sets `quark_head`, with the prefix, and `quark_rest`, which follows it."""
    added = tokenizer.added_tokens_decoder
    tokens = [added[i] for i in start_ids if i in added]
    is_known = 0 < len(tokens) == len(start_ids)
    text = "".join(token.content for token in tokens) if is_known else ""
    start = _quote(text)
    # A token with lstrip or rstrip takes the blanks around it from the text, so they must not follow a reward token.
    # Other tokenizers drop blanks before any token, so that a chat starts with `start_ids` in spite of them.
    drops_blanks = is_known and (tokens[0].lstrip or _drops_blanks(tokenizer, text, list(start_ids)))
    bare = "quark_text.lstrip()" if drops_blanks else "quark_text"
    rest = f"{bare}[quark_start | length:]" + (".lstrip()" if is_known and tokens[-1].rstrip else "")
    return (
        "{% set quark_start = " + start + " if " + bare + ".startswith(" + start + ") else '' %}"
        "{% set quark_rest = " + rest + " if quark_start else quark_text %}"
        "{% set quark_head = quark_start + quark_prefix" + _blank(tokenizer) + " %}"
    )


def _drops_blanks(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> bool:
    """Return whether the tokenizer gives a text these ids with blanks before it, too."""
    try:
        return all(tokenizer.encode(blank + text, add_special_tokens=False) == ids for blank in (" ", "\n"))
    except Exception:  # noqa: BLE001 - the tokenizers library raises no other type where it has no UNK
        return False


def _blank(tokenizer: PreTrainedTokenizerBase) -> str:
    """Jinja that adds a blank behind a prefix if the tokenizer adds one at the start of a text only."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    step = state["pre_tokenizer"] or {}
    while step.get("type") == "Sequence":
        step = step["pretokenizers"][0]
    if step.get("type") != "Metaspace" or step["prepend_scheme"] != "first":
        return ""
    if '"Prepend"' in json.dumps(state["normalizer"]):
        return ""  # It adds a blank behind each special token.
    blank = step["replacement"]
    # No blank is added before another one or before a special token.
    exceptions = [" ", blank, *(token.content for token in tokenizer.added_tokens_decoder.values())]
    starts = ", ".join(map(_quote, exceptions))
    needs_blank = f"quark_rest and quark_prefix and not quark_start and not quark_rest.startswith(({starts}))"
    return f" + ({_quote(blank)} if {needs_blank} else '')"


def _mark_generation(template: str) -> str | None:
    """The template with calls of `quark_generation` for its `{% generation %}` blocks; None if it has no such block."""
    tags = {"generation": "call quark_generation()", "endgeneration": "endcall"}
    try:
        lexemes = list(Environment(keep_trailing_newline=True).lex(template))
    except TemplateSyntaxError:  # transformers reports it when it renders a chat.
        return None
    pieces, is_first, has_tags = [], False, False
    for _, kind, text in lexemes:
        is_tag = is_first and kind == "name" and text in tags
        has_tags = has_tags or is_tag
        pieces.append(tags[text] if is_tag else text)
        is_first = kind == "block_begin" or (is_first and kind == "whitespace")
    return "".join(pieces) if has_tags else None


def _quote(text: str) -> str:
    """A Jinja string; JSON escapes as Python does, which Jinja follows."""
    return json.dumps(text, ensure_ascii=False)
