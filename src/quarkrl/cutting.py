"""Prompts from texts: the first tokens of each."""

from itertools import compress
from typing import Any

from quarkrl.errors import UserError
from quarkrl.prompts import Prompts


def cut(prompts: Prompts, tokenizer: Any, tokens: int) -> Prompts:
    """Prompts of the first `tokens` tokens of each text; shorter texts are left out and counted as "short".

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
    texts = [_beginning(tokenizer, str(text), tokens) for text in prompts.prompts]
    keep = [text is not None for text in texts]
    if not any(keep):
        raise UserError(f"prompt_tokens {tokens}: no text has so many tokens; want fewer")
    return Prompts(
        prompts=[text for text in texts if text is not None],
        columns={name: list(compress(values, keep)) for name, values in prompts.columns.items()},
        locations=list(compress(prompts.locations, keep)),
        skipped={**prompts.skipped, **({"short": keep.count(False)} if not all(keep) else {})},
    )


def _beginning(tokenizer: Any, text: str, tokens: int) -> str | None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        return None
    beginning = tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False)
    # A cut may fall within a character of several tokens.
    return beginning.rstrip("\ufffd") or None
