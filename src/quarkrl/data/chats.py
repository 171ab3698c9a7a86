"""Chats as prompts: lists of messages as in OpenAI's API, encoded with the tokenizer's chat template.

    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]

The completion is the next message of the assistant. A chat that ends with a message of the assistant is continued: the
completion continues that message. `transformers.pipeline` does the same.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

from jinja2 import Environment, TemplateSyntaxError

from quarkrl.errors import UserError, one_line, shorten

Chat: TypeAlias = Sequence[Mapping[str, Any]]

# Directives of strftime, with glibc's flag for numbers without a leading zero.
_DIRECTIVE = re.compile(r"%-?[a-zA-Z%]")


class RefusedChat(NamedTuple):
    """A chat that the chat template cannot render.

    Attributes:
        reason: the template's error, in one line.
    """

    reason: str


# Messages


def find_fault(chat: object) -> str | None:
    """Return what is wrong with the messages of a chat, or None."""
    if not isinstance(chat, list | tuple):
        return f"it is {shorten(chat)}"
    if not chat:
        return "there are no messages"
    for message in chat:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"{shorten(message)} has no role"
        content = message.get("content")
        if content is None:
            if not message.get("tool_calls"):
                return f"{shorten(message)} has neither content nor tool_calls"
        elif not isinstance(content, str) and not (isinstance(content, list) and all(map(_is_text_part, content))):
            return f"content {shorten(content)} is neither text nor a list of text parts"
    return None


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message; for a message that only calls tools, the calls as JSON."""
    content = message.get("content")
    if content is None:
        return json.dumps(message.get("tool_calls"), ensure_ascii=False, default=str)
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def prompt_text(prompt: str | Chat) -> str:
    """Return a prompt as one text, for files: a chat as the JSON of its messages."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str)


def read_prompt_text(text: Any) -> Any:
    """Return the prompt that `prompt_text` has written: the messages of a chat, or the text as it is."""
    if not (isinstance(text, str) and text.startswith("[{")):
        return text
    try:
        chat = json.loads(text)
    except ValueError:
        return text
    return text if find_fault(chat) else chat


def displayed(prompt: str, completion: str, is_continued: bool = True) -> tuple[str, str]:
    """Return a prompt that `prompt_text` has written and a completion, as people read them one after the other.

    Of a chat, the last message and an arrow precede the completion.

    Args:
        prompt, completion: their texts.
        is_continued: whether a completion continues a prompt that is a text. Without, an arrow separates them.
    """
    try:
        chat = json.loads(prompt) if prompt.startswith("[{") else None
        shown = prompt if chat is None else message_text(chat[-1])
    except (ValueError, KeyError, TypeError, AttributeError):
        chat, shown = None, prompt
    return (shown, completion) if chat is None and is_continued else (f"{shown} → ", completion.lstrip())


def is_continued(chat: Chat) -> bool:
    """Return whether a completion continues the last message of a chat, because it is one of the assistant."""
    return chat[-1]["role"] == "assistant"


def with_completion(chat: Chat, completion: str) -> list[dict[str, Any]]:
    """Return a chat with a completion of it: as its next message, or behind the message that it continues."""
    messages = [dict(message) for message in chat]
    if is_continued(chat):
        return [*messages[:-1], {**messages[-1], "content": message_text(messages[-1]) + completion}]
    return [*messages, {"role": "assistant", "content": completion}]


def as_question(prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a text as a chat with one message of the user, and a chat as it is."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_messages(prompts: Sequence[Any], completions: Sequence[str]) -> list[Any]:
    """Return the completions of chats as lists of one message, as TRL does, and those of texts as they are."""
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


# Chat templates


def reads_chats(tokenizer: Any) -> bool:
    """Return whether the tokenizer has a chat template, and a default one if it has several."""
    templates = tokenizer.chat_template
    return "default" in templates if isinstance(templates, dict) else templates is not None


def encode_chats(tokenizer: Any, chats: Sequence[Chat]) -> list[list[int] | RefusedChat]:
    """Encode chats as token ids, and report those that the chat template refuses.

    A template that reads only texts gets the parts of a message joined with newlines, as in vLLM.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    _check_template(tokenizer)
    reads_parts = _reads_parts_of(tokenizer, chats)
    results: list[Any] = [None] * len(chats)
    for continued in (False, True):
        rows = [row for row, chat in enumerate(chats) if is_continued(chat) == continued]
        prepared = [[_prepare(message, reads_parts) for message in chats[row]] for row in rows]
        for row, ids in zip(rows, _apply_template(tokenizer, prepared, continued), strict=True):
            results[row] = ids
    return results


def render_chat(tokenizer: Any, chat: Chat) -> str:
    """Return the text of a chat that the model continues, as the chat template writes it.

    Raises:
        Exception: the template refuses the chat, by an error of any type.
    """
    reads_parts = _reads_parts_of(tokenizer, [chat])
    messages = [_prepare(message, reads_parts) for message in chat]
    return tokenizer.apply_chat_template(messages, tokenize=False, **_ending(is_continued(chat)))


def _check_template(tokenizer: Any) -> None:
    if reads_chats(tokenizer):
        return
    if tokenizer.chat_template is None:
        raise UserError(
            "prompts: must be text, because the tokenizer has no chat template. "
            "Use text, or a tokenizer with a chat template."
        )
    names = ", ".join(map(repr, sorted(tokenizer.chat_template)))
    raise UserError(
        f"prompts: must be text, because the tokenizer has only the chat templates {names}. "
        "Use text, or name one of them 'default'."
    )


def _reads_parts_of(tokenizer: Any, chats: Sequence[Chat]) -> bool:
    """Whether chats have no parts, or the chat template writes their texts, and not the list as a Python literal."""
    if not any(isinstance(message.get("content"), list) for chat in chats for message in chat):
        return True
    probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False)
    except Exception:  # noqa: BLE001 - a template raises what its author wrote
        return False
    return "probe" in text and not re.search("""["']type["']""", text)


def _prepare(message: Mapping[str, Any], reads_parts: bool) -> dict[str, Any]:
    """A message without null entries, which older versions of transformers write as "None"."""
    prepared = {key: value for key, value in message.items() if value is not None}
    if isinstance(prepared.get("content"), list) and not reads_parts:
        prepared["content"] = message_text(message)
    return prepared


def _ending(continued: bool) -> dict[str, bool]:
    return {"continue_final_message": True} if continued else {"add_generation_prompt": True}


def _apply_template(tokenizer: Any, chats: list[Any], continued: bool) -> list[Any]:
    if not chats:
        return []
    try:
        return tokenizer.apply_chat_template(chats, tokenize=True, return_dict=False, **_ending(continued))
    # A template raises errors of any type, and the tokenizers library a bare Exception for an unknown word.
    except Exception as error:  # noqa: BLE001
        if middle := len(chats) // 2:  # Bisect for the refused chats.
            halves = chats[:middle], chats[middle:]
            return [ids for half in halves for ids in _apply_template(tokenizer, half, continued)]
        return [RefusedChat(one_line(error))]


# Templates with today's date


def is_dated(tokenizer: Any) -> bool:
    """Return whether a chat template of the tokenizer writes the current date or time."""
    return any("strftime_now" in template for template in _templates(tokenizer).values())


def with_fixed_date(tokenizer: Any, moment: datetime) -> Any:
    """Return the tokenizer with chat templates that write the given date and time instead of the current ones.

    Args:
        tokenizer: it is not changed.
        moment: the date and time to write.
    """
    if not is_dated(tokenizer):
        return tokenizer
    fixed = {name: _fix_date(template, moment) for name, template in _templates(tokenizer).items()}
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = fixed if isinstance(tokenizer.chat_template, dict) else fixed[""]
    return tokenizer


def _templates(tokenizer: Any) -> dict[str, str]:
    """The chat templates of a tokenizer by name; a single one has the name ""."""
    templates = tokenizer.chat_template or {}
    return templates if isinstance(templates, dict) else {"": templates}


def _fix_date(template: str, moment: datetime) -> str:
    """A template with a macro in the place of transformers' function `strftime_now`."""
    try:
        strings = [text for _, kind, text in Environment().lex(template) if kind == "string"]
    except TemplateSyntaxError:  # transformers reports it when it renders a chat.
        return template
    directives = sorted({directive for text in strings for directive in _DIRECTIVE.findall(text)})
    replacements = "".join(f" | replace({json.dumps(one)}, {json.dumps(moment.strftime(one))})" for one in directives)
    # The newline is dropped; the template starts on a line of its own, as its first blanks may depend on that.
    return "{% macro strftime_now(format) %}{{ format" + replacements + " }}{% endmacro %}\n" + template
