"""The one way from text to token ids, and back: prompts as text or chat messages, and completions.

    encode_prompts(tokenizer, ["You are", [{"role": "user", "content": "Hello!"}]])

A text is encoded as `tokenizer(text)` does, and a chat with the tokenizer's chat template (`chats.py`). Special tokens
that the tokenizer adds behind a text, such as EOS, are removed, because a completion continues the text. For an
encoder–decoder model (`for_encoder`) they stay, and the completion is a text of its own.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from quarkrl.data.chats import RefusedChat, encode_chats, find_fault
from quarkrl.errors import UserError, one_line, shorten

Prompt: TypeAlias = str | list[dict[str, Any]]

logger = logging.getLogger(__name__)

_BATCH_SIZE = 4096  # Texts per call of the tokenizer; it bounds the memory of the tokenizer's own records.
_LONGEST_CHARACTER = 4  # Bytes of UTF-8, so at most as many tokens.


class RefusedText(NamedTuple):
    """A text that the tokenizer cannot encode, such as an unknown word where there is no UNK.

    Attributes:
        reason: the tokenizer's error, in one line.
    """

    reason: str


def for_encoder(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer for an encoder–decoder model, whose encoder reads the whole prompt.

    The special tokens behind a prompt, such as EOS, belong to it, and a completion is decoded alone.
    """
    tokenizer = copy.copy(tokenizer)
    tokenizer._is_for_encoder = True
    return tokenizer


def is_for_encoder(tokenizer: Any) -> bool:
    """Return whether `for_encoder` has made a tokenizer."""
    return getattr(tokenizer, "_is_for_encoder", False)


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], *, empty_ids: Sequence[int] | None = None
) -> list[list[int]]:
    """Encode prompts as token ids; see `try_encode_prompts`.

    Raises:
        UserError: a chat is malformed, the tokenizer or its chat template refuses a prompt, or the tokenizer has no
            chat template.
    """
    for prompt in prompts:
        if not isinstance(prompt, str) and (fault := find_fault(prompt)):
            raise UserError(f"prompt {shorten(prompt)}: must be text or a list of messages, but {fault}. Correct it.")
    encoded = []
    for prompt, ids in zip(prompts, try_encode_prompts(tokenizer, prompts, empty_ids=empty_ids), strict=True):
        if isinstance(ids, RefusedChat):
            raise UserError(f"prompt {shorten(prompt)}: the chat template refuses it ({ids.reason}). Use text.")
        if isinstance(ids, RefusedText):
            raise UserError(f"prompt {shorten(prompt)}: the tokenizer refuses it ({ids.reason}). Use other text.")
        encoded.append(ids)
    return encoded


def try_encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], *, empty_ids: Sequence[int] | None = None
) -> list[list[int] | RefusedChat | RefusedText]:
    """Encode prompts as token ids, and report those that the tokenizer or its chat template refuses.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompts: texts, and chats as lists of messages.
        empty_ids: the ids of a text without tokens of its own, such as BOS; by default it has none. For an encoder,
            they also have the special tokens behind a text.

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
        encoded = _encode_texts(tokenizer, [prompts[i] for i in batch], empty_ids)
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


def encode_as_text(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Encode texts in which the characters of a special token, such as "</s>", are text and not that token.

    Args:
        tokenizer: a `transformers` tokenizer.
        texts: what a model or a user wrote.
        options: of the tokenizer.
    """
    encoded = _split_special_tokens(tokenizer, texts, options)
    if _has_special_tokens(tokenizer, encoded):
        encoded = _split_special_tokens(tokenizer, [break_special_tokens(tokenizer, text) for text in texts], options)
    return encoded["input_ids"]


def encode_pairs_as_text(
    tokenizer: Any, prompts: Sequence[str], texts: Sequence[str], **options: Any
) -> Iterator[tuple[list[int], list[int]]]:
    """Encode each prompt together with the text that continues it, and split the token ids; see `encode_as_text`.

    A token that spans both belongs to the continuation. Special tokens that the tokenizer appends are left out.

    Raises:
        UserError: the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {type(tokenizer).__name__}: must be a fast tokenizer, with character offsets. Choose a model "
            "with a tokenizer.json."
        )
    options |= {"return_offsets_mapping": True}
    for start in range(0, len(texts), _BATCH_SIZE):
        pairs = list(zip(prompts[start : start + _BATCH_SIZE], texts[start : start + _BATCH_SIZE], strict=True))
        encoded = _split_special_tokens(tokenizer, [head + tail for head, tail in pairs], options)
        if _has_special_tokens(tokenizer, encoded):
            pairs = [
                (break_special_tokens(tokenizer, head), break_special_tokens(tokenizer, tail)) for head, tail in pairs
            ]
            encoded = _split_special_tokens(tokenizer, [head + tail for head, tail in pairs], options)
        rows = zip(encoded["input_ids"], encoded["special_tokens_mask"], encoded["offset_mapping"], strict=True)
        for (head, _), (ids, is_special, offsets) in zip(pairs, rows, strict=True):
            length = len(ids)
            while length and is_special[length - 1]:  # The tokenizer appends an EOS.
                length -= 1
            tail = (k for k in range(length) if not is_special[k] and offsets[k][1] > len(head))
            split = next(tail, length)
            yield ids[:split], ids[split:length]


def break_special_tokens(tokenizer: Any, text: str) -> str:
    """Put a space into each special token's characters, so that they stay text where special tokens are parsed."""
    names = {name for name in _special_tokens(tokenizer) if len(name) > 1}
    if not names:
        return text
    # The longest first: one name may begin with another. Some tokenizers ignore case.
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(pattern, lambda match: f"{match[0][0]} {match[0][1:]}", text, flags=re.IGNORECASE)


def _special_tokens(tokenizer: Any) -> set[str]:
    """The special tokens of a tokenizer, with those that have no name, such as "<|im_start|>"."""
    unnamed = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return unnamed.union(tokenizer.all_special_tokens)


def _split_special_tokens(tokenizer: Any, texts: Sequence[str], options: dict[str, Any]) -> Any:
    return tokenizer(list(texts), split_special_tokens=True, return_special_tokens_mask=True, verbose=False, **options)


def _has_special_tokens(tokenizer: Any, encoded: Any) -> bool:
    """Whether texts were read as special tokens: Unigram and WordLevel have those in their own vocabularies."""
    special_ids = set(tokenizer.convert_tokens_to_ids(sorted(_special_tokens(tokenizer)))) - {tokenizer.unk_token_id}
    rows = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return any(i in special_ids and not added for ids, mask in rows for i, added in zip(ids, mask, strict=True))


def decode_completions(
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    keep_special_tokens_before: Sequence[int] | None = None,
) -> list[str]:
    """Decode completions as text, for rewards and for people: without special tokens, otherwise unchanged.

    A completion is the text of prompt and completion without the text of the prompt. Decoded alone, it would lose its
    leading space (SentencePiece), or keep the "##" of a word that it continues (WordPiece). The completion of an
    encoder–decoder model continues nothing, and is decoded alone.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompt_ids: token ids of each completion's prompt.
        completions: token ids of the completions.
        keep_special_tokens_before: EOS ids; keep special tokens, such as answer tags, except an EOS at the end.
    """
    skip = keep_special_tokens_before is None
    ends = set(keep_special_tokens_before or ())
    completions = [ids[:-1] if len(ids) and ids[-1] in ends else ids for ids in completions]
    prompts: list[tuple[int, ...]] = [() if is_for_encoder(tokenizer) else tuple(ids) for ids in prompt_ids]
    distinct_prompts = list(dict.fromkeys(prompts))
    prompt_texts = dict(zip(distinct_prompts, _decode(tokenizer, distinct_prompts, skip), strict=True))
    pairs = list(zip(prompts, completions, strict=True))
    texts = _decode(tokenizer, [[*prompt, *completion] for prompt, completion in pairs], skip)
    return [
        text[len(prompt_texts[prompt]) :]
        if text.startswith(prompt_texts[prompt])
        else _decode_after_unstable_prompt(partial(_decode, tokenizer, skip=skip), prompt, completion, text)
        for (prompt, completion), text in zip(pairs, texts, strict=True)
    ]


def _decode_after_unstable_prompt(
    decode: Callable[[list[Sequence[int]]], list[str]], prompt: Sequence[int], completion: Sequence[int], text: str
) -> str:
    """Decode a completion whose tokens change the text of the prompt.

    If the prompt ends within a character, the character belongs to the completion. Otherwise the completion is decoded
    alone.
    """
    (prompt_text,) = decode([prompt])
    for end in range(len(prompt) - 1, max(len(prompt) - _LONGEST_CHARACTER, -1), -1):
        (head,) = decode([prompt[:end]])
        if text.startswith(head) and prompt_text.startswith(head) and not prompt_text[len(head) :].strip("\ufffd"):
            return text[len(head) :]
    return decode([completion])[0]


def _decode(tokenizer: Any, rows: Sequence[Sequence[int]], skip: bool) -> list[str]:
    rows = [list(row) for row in rows]
    return tokenizer.batch_decode(rows, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def warn_of_second_bos(tokenizer: Any, prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]]) -> None:
    """Log a warning if texts start with the BOS that the tokenizer adds too."""
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None:
        return
    encoded = [(text, ids) for text, ids in zip(prompts, prompt_ids, strict=True) if isinstance(text, str)]
    spelled = [(text, ids) for text, ids in encoded if text.startswith(bos)]
    if count := sum(list(ids).count(bos_id) > text.count(bos) for text, ids in spelled):
        logger.warning(
            f"{count} of {len(encoded)} texts start with the BOS {bos}, which the tokenizer adds too: they have two. "
            "Remove it from the texts."
        )


def _encode_texts(tokenizer: Any, texts: list[Any], empty_ids: Sequence[int] | None) -> list[list[int] | RefusedText]:
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
        whole, empty = ids[:end], list(empty_ids or ())
        if is_for_encoder(tokenizer):  # It reads the special tokens behind a text, too.
            whole, empty = ids, [] if empty_ids is None else ids
        results.append(whole if end else empty)
    return results
