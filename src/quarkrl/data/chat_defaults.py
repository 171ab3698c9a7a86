"""Defaults of a chat template: a system prompt, and arguments such as `enable_thinking`.

They are written into the chat template itself. So training, generation, evaluation and `final/` read the same ids, and
every program that renders the template does. A chat with a system message keeps its own, and an argument that a program
passes to the template takes precedence.
"""

import copy
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from quarkrl.data.chats import reads_chats
from quarkrl.errors import UserError, did_you_mean, one_line, shorten

LastTurn: TypeAlias = Literal["refuse", "continue", "drop"]

LAST_TURN_HELP = "Chats that end with the assistant: refuse, continue, or drop it."
SYSTEM_PROMPT_HELP = "System message of chats without one."
TEMPLATE_KWARGS_HELP = "Arguments of the chat template: '{\"enable_thinking\": false}'."

_OPTION = "chat_template_kwargs"
_REMEDY = "Use JSON, such as '{\"enable_thinking\": false}'."
# What programs pass to every chat template.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


def read_template_kwargs(value: Any) -> dict[str, Any] | None:
    """Read the option `chat_template_kwargs`: a dict, or one as JSON.

    Raises:
        UserError: it is something else, or names a variable that programs set themselves.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{_OPTION} {shorten(value)}: must be a JSON object ({error}). {_REMEDY}") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{_OPTION} {shorten(value)}: must be a JSON object. {_REMEDY}")
    for name, argument in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name) or name in _RESERVED:
            raise UserError(f"{_OPTION} {shorten(name)}: must be a variable of the chat template. {_REMEDY}")
        _literal(argument)
    return dict(value)


def with_chat_defaults(
    tokenizer: Any, system_prompt: str | None = None, template_kwargs: Mapping[str, Any] | str | None = None
) -> Any:
    """Return a tokenizer whose chat templates have other defaults; the tokenizer itself if there are none.

    Args:
        tokenizer: it is not changed.
        system_prompt: the system message of chats that do not start with one.
        template_kwargs: arguments of the chat template, for programs that do not pass them; a dict, or JSON.

    Raises:
        UserError: the tokenizer has no chat template, or its template does not read a default.
    """
    arguments = read_template_kwargs(template_kwargs) or {}
    if system_prompt is None and not arguments:
        return tokenizer
    option = _OPTION if system_prompt is None else "system_prompt"
    if not reads_chats(tokenizer):
        raise UserError(f"{option}: must be left out, because the tokenizer has no chat template. Remove --{option}.")
    head = "" if system_prompt is None else _system_head(system_prompt)
    head += "".join(_argument_head(name, value) for name, value in arguments.items())
    templates = tokenizer.chat_template
    for name in arguments:
        _check_is_read(name, templates["default"] if isinstance(templates, dict) else templates)
    changed = copy.copy(tokenizer)
    # The newline behind the tag is dropped, and the template starts on a line of its own, as before.
    if isinstance(templates, dict):
        changed.chat_template = {name: f"{head}\n{template}" for name, template in templates.items()}
    else:
        changed.chat_template = f"{head}\n{templates}"
    if system_prompt is not None:
        _check_is_written(changed, tokenizer, system_prompt)
    return changed


def _system_head(text: str) -> str:
    message = f"[{{'role': 'system', 'content': {_literal(text)}}}]"
    return (
        "{% if messages and messages[0]['role'] not in ['system', 'developer'] %}"
        "{% set messages = " + message + " + messages %}{% endif %}"
    )


def _argument_head(name: str, value: Any) -> str:
    return "{% if " + name + " is not defined %}{% set " + name + " = " + _literal(value) + " %}{% endif %}"


def _literal(value: Any) -> str:
    """A value of JSON in Jinja."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    raise UserError(f"{_OPTION} {shorten(value)}: must hold values that JSON has. {_REMEDY}")


def _check_is_read(name: str, template: str) -> None:
    words = set(re.findall(r"[A-Za-z_]\w*", " ".join(re.findall(r"\{[{%].*?[}%]\}", template, re.S))))
    if name not in words:
        raise UserError(
            f"{_OPTION} {name!r}: must be a variable that the chat template reads.{did_you_mean(name, sorted(words))}"
        )


def _check_is_written(tokenizer: Any, plain_tokenizer: Any, text: str) -> None:
    """Check that the chat template accepts the system prompt, and writes it."""
    question = [{"role": "user", "content": "a"}]
    try:
        written, plain = (
            one.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
            for one in (tokenizer, plain_tokenizer)
        )
    except Exception as error:
        # A template raises what its author wrote.
        raise UserError(
            f"system_prompt {shorten(text)}: must be left out, because the chat template refuses it "
            f"({one_line(error)}). Remove --system_prompt."
        ) from error
    if written == plain:
        raise UserError(
            f"system_prompt {shorten(text)}: must be left out, because the chat template ignores system messages. "
            "Remove --system_prompt."
        )
