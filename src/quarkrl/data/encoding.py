"""The one way from text to token ids, and back: prompts as text or chat messages, and completions.

    encode_prompts(tokenizer, ["You are", [{"role": "user", "content": "Hello!"}]])

A text is encoded as `tokenizer(text)` does, and a chat with the tokenizer's chat template (`chats.py`). An EOS that the
tokenizer appends to a text is removed, because a completion continues the text.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from quarkrl.data.chats import RefusedChat, encode_chats
from quarkrl.errors import UserError, shorten

Prompt: TypeAlias = str | list[dict[str, Any]]

_BATCH_SIZE = 4096  # Texts per call of the tokenizer; it bounds the memory of the tokenizer's own records.


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], *, allow_empty: bool = False) -> list[list[int]]:
    """Encode prompts as token ids; see `try_encode_prompts`.

    Raises:
        UserError: the chat template refuses a chat, or the tokenizer has no chat template.
    """
    encoded = []
    for prompt, ids in zip(prompts, try_encode_prompts(tokenizer, prompts, allow_empty=allow_empty), strict=True):
        if isinstance(ids, RefusedChat):
            raise UserError(f"prompt {shorten(prompt)}: the chat template refuses it ({ids.reason}). Use text.")
        encoded.append(ids)
    return encoded


def try_encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], *, allow_empty: bool = False
) -> list[list[int] | RefusedChat]:
    """Encode prompts as token ids, and report those that the chat template refuses.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompts: texts, and chats as lists of messages.
        allow_empty: encode a text without tokens of its own as the special tokens that the tokenizer puts first, such
            as BOS. By default it has no tokens.

    Returns:
        For each prompt its token ids, or why the chat template refuses it.

    Raises:
        UserError: there is a chat, and the tokenizer has no chat template.
    """
    results: list[Any] = [None] * len(prompts)
    texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
    chats = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    for start in range(0, len(texts), _BATCH_SIZE):
        batch = texts[start : start + _BATCH_SIZE]
        encoded = _encode_texts(tokenizer, [prompts[i] for i in batch], allow_empty)
        for i, ids in zip(batch, encoded, strict=True):
            results[i] = ids
    for start in range(0, len(chats), _BATCH_SIZE):
        batch = chats[start : start + _BATCH_SIZE]
        messages: list[Any] = [prompts[i] for i in batch]
        for i, result in zip(batch, encode_chats(tokenizer, messages), strict=True):
            results[i] = result
    return results


def encode_plain_texts(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """Encode texts as token ids without special tokens, such as texts to truncate or to compare."""
    for start in range(0, len(texts), _BATCH_SIZE):
        batch = list(texts[start : start + _BATCH_SIZE])
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def decode_completions(tokenizer: Any, completions: Sequence[Sequence[int]]) -> list[str]:
    """Decode completions as text, for rewards and for people: without special tokens, otherwise unchanged."""
    return tokenizer.batch_decode(completions, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _encode_texts(tokenizer: Any, texts: list[Any], allow_empty: bool) -> Iterator[list[int]]:
    # The mask distinguishes an EOS that the tokenizer appends from one in the text.
    encoded = tokenizer(texts, return_special_tokens_mask=True, verbose=False)
    for ids, is_special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        if all(is_special) and not allow_empty:
            yield []
        else:
            yield ids[:-1] if ids and is_special[-1] and ids[-1] == tokenizer.eos_token_id else ids
