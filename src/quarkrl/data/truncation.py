"""Prompts from texts: the first tokens of each."""

from typing import Any

from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError

CONTINUATION = "continuation"  # the column with the rest of a text


def cut(prompts: Prompts, tokenizer: Any, tokens: int) -> Prompts:
    """Prompts of the first `tokens` tokens of each text; shorter texts are left out and counted as "short".

    The rest of each text becomes the column `continuation`, unless there is such a column: what people wrote there.

    Args:
        prompts: texts, not chats.
        tokenizer: a `transformers` tokenizer; its special tokens are not counted.
        tokens: at least 1.

    Raises:
        UserError: there are chats among them, or no text is long enough.
    """
    chats = [
        where for where, prompt in zip(prompts.locations, prompts.prompts, strict=True) if isinstance(prompt, list)
    ]
    if chats:
        raise UserError(f"{chats[0]}: prompt_tokens cuts texts, and this is a chat; leave it out")
    parts = [_parts(tokenizer, str(text), tokens) for text in prompts.prompts]
    if not any(parts):
        raise UserError(f"prompt_tokens {tokens}: no text has so many tokens; want fewer")
    found = prompts.without([None if part else "short" for part in parts])
    found.prompts = [part[0] for part in parts if part]
    found.columns.setdefault(CONTINUATION, [part[1] for part in parts if part])
    return found


def _parts(tokenizer: Any, text: str, tokens: int) -> tuple[str, str] | None:
    """A text's beginning and the rest of it; None where it is too short."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        return None
    # A cut may fall within a character of several tokens.
    beginning = tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False).rstrip("\ufffd")
    if not beginning:
        return None
    # What a tokenizer has changed, such as the case, is no beginning of the text to go on from.
    return beginning, text[len(beginning) :] if text.startswith(beginning) else ""
