"""Truncation of texts to prompts: the first tokens of each text."""

from typing import Any

from quarkrl.data.encoding import encode_plain_texts
from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError

CONTINUATION = "continuation"  # The column with the rest of each text.


def truncate_to_prompts(texts: Prompts, tokenizer: Any, prompt_tokens: int) -> Prompts:
    """Truncate each text to a prompt of its first `prompt_tokens` tokens.

    Shorter texts are skipped and counted as "short". The rest of each text becomes the column `continuation`, unless
    there is such a column: it is what people wrote after the prompt.

    Args:
        texts: texts, not chats.
        tokenizer: a `transformers` tokenizer; its special tokens are not counted.
        prompt_tokens: at least 1.

    Raises:
        UserError: there is a chat, or no text is long enough.
    """
    for location, text in zip(texts.locations, texts.prompts, strict=True):
        if not isinstance(text, str):
            raise UserError(f"prompt_tokens {prompt_tokens}: must not be set for chats, and {location} is a chat.")
    strings = [str(text) for text in texts.prompts]
    encoded = encode_plain_texts(tokenizer, strings)
    parts = [_split(tokenizer, text, ids, prompt_tokens) for text, ids in zip(strings, encoded, strict=True)]
    if not any(parts):
        raise UserError(f"prompt_tokens {prompt_tokens}: no text has so many tokens. Set a smaller number.")
    prompts = texts.skip([None if part else "short" for part in parts])
    prompts.prompts = [part[0] for part in parts if part]
    prompts.columns.setdefault(CONTINUATION, [part[1] for part in parts if part])
    return prompts


def _split(tokenizer: Any, text: str, ids: list[int], prompt_tokens: int) -> tuple[str, str] | None:
    """Split a text into its first tokens and the rest; None if it is too short."""
    if len(ids) < prompt_tokens:
        return None
    # The last token may end within a character.
    prompt = tokenizer.decode(ids[:prompt_tokens], clean_up_tokenization_spaces=False).rstrip("\ufffd")
    if not prompt:
        return None
    # A tokenizer that changes the text, such as its case, gives no prefix of it, so the rest is unknown.
    return prompt, text[len(prompt) :] if text.startswith(prompt) else ""
