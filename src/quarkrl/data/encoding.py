"""The one way from text to token ids, and back: prompts as text or chat messages, and completions.

    encode_prompts(tokenizer, ["You are", [{"role": "user", "content": "Hello!"}]])

A text is encoded as `tokenizer(text)` does, and a chat with the tokenizer's chat template (`chats.py`). Special tokens
that the tokenizer adds behind a text, such as EOS, are removed, because a completion continues the text.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from quarkrl.data.chats import RefusedChat, encode_chats
from quarkrl.errors import UserError, one_line, shorten

Prompt: TypeAlias = str | list[dict[str, Any]]

logger = logging.getLogger(__name__)

_BATCH_SIZE = 4096  # Texts per call of the tokenizer; it bounds the memory of the tokenizer's own records.


class RefusedText(NamedTuple):
    """A text that the tokenizer cannot encode, such as an unknown word where there is no UNK.

    Attributes:
        reason: the tokenizer's error, in one line.
    """

    reason: str


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], *, empty_ids: Sequence[int] = ()) -> list[list[int]]:
    """Encode prompts as token ids; see `try_encode_prompts`.

    Raises:
        UserError: the tokenizer or its chat template refuses a prompt, or the tokenizer has no chat template.
    """
    encoded = []
    for prompt, ids in zip(prompts, try_encode_prompts(tokenizer, prompts, empty_ids=empty_ids), strict=True):
        if isinstance(ids, RefusedChat):
            raise UserError(f"prompt {shorten(prompt)}: the chat template refuses it ({ids.reason}). Use text.")
        if isinstance(ids, RefusedText):
            raise UserError(f"prompt {shorten(prompt)}: the tokenizer refuses it ({ids.reason}). Use other text.")
        encoded.append(ids)
    return encoded


def try_encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], *, empty_ids: Sequence[int] = ()
) -> list[list[int] | RefusedChat | RefusedText]:
    """Encode prompts as token ids, and report those that the tokenizer or its chat template refuses.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompts: texts, and chats as lists of messages.
        empty_ids: the ids of a text without tokens of its own, such as BOS; by default it has none.

    Returns:
        For each prompt its token ids, or why it is refused.

    Raises:
        UserError: there is a chat, and the tokenizer has no chat template.
    """
    results: list[Any] = [None] * len(prompts)
    texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
    chats = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    for start in range(0, len(texts), _BATCH_SIZE):
        batch = texts[start : start + _BATCH_SIZE]
        encoded = _encode_texts(tokenizer, [prompts[i] for i in batch], list(empty_ids))
        for i, ids in zip(batch, encoded, strict=True):
            results[i] = ids
    for start in range(0, len(chats), _BATCH_SIZE):
        batch = chats[start : start + _BATCH_SIZE]
        messages: list[Any] = [prompts[i] for i in batch]
        for i, result in zip(batch, encode_chats(tokenizer, messages), strict=True):
            results[i] = result
    _warn_of_second_bos(tokenizer, [(prompts[i], results[i]) for i in texts])
    return results


def encode_plain_texts(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """Encode texts as token ids without special tokens, such as texts to truncate or to compare."""
    for start in range(0, len(texts), _BATCH_SIZE):
        batch = list(texts[start : start + _BATCH_SIZE])
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def decode_completions(tokenizer: Any, completions: Sequence[Sequence[int]]) -> list[str]:
    """Decode completions as text, for rewards and for people: without special tokens, otherwise unchanged."""
    return tokenizer.batch_decode(completions, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _warn_of_second_bos(tokenizer: Any, encoded: Sequence[tuple[Any, Any]]) -> None:
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None:
        return
    spelled = [(text, ids) for text, ids in encoded if text.startswith(bos) and isinstance(ids, list)]
    if count := sum(ids.count(bos_id) > text.count(bos) for text, ids in spelled):
        logger.warning(
            f"{count} of {len(encoded)} texts start with the BOS {bos}, which the tokenizer adds too: they have two. "
            "Remove it from the texts."
        )


def _encode_texts(tokenizer: Any, texts: list[Any], empty_ids: list[int]) -> list[list[int] | RefusedText]:
    try:
        # The mask distinguishes special tokens that the tokenizer adds from those in the text.
        encoded = tokenizer(texts, return_special_tokens_mask=True, verbose=False)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises no other type
        if middle := len(texts) // 2:  # Bisect for the refused texts.
            return [
                ids for half in (texts[:middle], texts[middle:]) for ids in _encode_texts(tokenizer, half, empty_ids)
            ]
        return [RefusedText(one_line(error))]
    results: list[list[int] | RefusedText] = []
    for ids, is_special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        end = len(ids)
        while end and is_special[end - 1]:
            end -= 1
        results.append(ids[:end] if end else empty_ids)
    return results
