"""Scored samples: a prompt, a completion and its rewards per row, from the same sources as prompts.

    {"prompt": "Once upon a time", "completion": " there was a cat.", "reward": 0.7}

A completion becomes the token ids that the sampler could have made. They continue the ids of the prompt. EOS ends them,
unless the limit of the length comes first. A completion may also be one message of the assistant, as in TRL.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quarkrl.data.chats import find_fault, message_text, prompt_text, read_prompt_text, with_completion
from quarkrl.data.encoding import decode_completions, encode_plain_texts, is_for_encoder, try_encode_prompts
from quarkrl.data.prompts import Prompts, reasons_to_skip
from quarkrl.data.rows import SURROGATE, BadRow, quote_names
from quarkrl.errors import UserError, shorten

COMPLETION = "completion"
NO_REWARD = "without a reward"


@dataclass(frozen=True)
class Ends:
    """How completions end.

    Attributes:
        max_length, min_length: tokens with EOS, at most; tokens before EOS, at least.
        of_text, of_chat: the EOS of a completed text, and of a message; None if there is none.
        all_ids: every id that ends a completion.
        keep_special_tokens: completions may have special tokens in their texts.
    """

    max_length: int
    min_length: int
    of_text: int | None
    of_chat: int | None
    all_ids: Sequence[int]
    keep_special_tokens: bool = False


@dataclass(frozen=True)
class ScoredSamples:
    """Samples as token ids, as if a run had explored them.

    Attributes:
        prompts: the prompt of each sample, encoded.
        completions: token ids of each completion.
        rewards: `(n, A)`, finite.
        note: a line for the user: how many samples there are, and what was skipped or truncated.
    """

    prompts: Prompts
    completions: list[list[int]]
    rewards: np.ndarray
    note: str

    def __len__(self) -> int:
        return len(self.completions)

    @classmethod
    def encode(cls, prompts: Prompts, tokenizer: Any, ends: Ends) -> "ScoredSamples":
        """Encode the completions of prompts that are encoded already.

        A completion that cannot be the model's own is skipped. It is empty, or has EOS in the middle, or no token ids
        write it behind the ids of its prompt.

        Args:
            prompts: from `check_scored`, encoded.
            tokenizer: that of the prompts.
            ends: how completions end.

        Raises:
            UserError: no sample is left.
        """
        end_tokens = tokenizer.convert_ids_to_tokens(list(ends.all_ids))
        texts = [_without_end(text, end_tokens) for text in prompts.columns[COMPLETION]]
        encoded = _encode(tokenizer, prompts, texts, ends)
        chats = [not isinstance(prompt, str) for prompt in prompts.as_encoded]
        finished = [
            _finish(ids, ends.of_chat if chat else ends.of_text, ends) for ids, chat in zip(encoded, chats, strict=True)
        ]
        reasons = [_fault(ids, done, ends) for ids, done in zip(encoded, finished, strict=True)]
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        samples = replace(prompts.skip(reasons), ids=[prompts.ids[i] for i in kept])
        check_any_left(samples)
        lengths = [len(encoded[i] or ()) for i in kept]
        columns = [values for name, values in samples.columns.items() if name != COMPLETION]
        note = _describe(
            samples, sum(n > ends.max_length for n in lengths), sum(n < ends.min_length for n in lengths), ends
        )
        return cls(samples, [finished[i] for i in kept], np.array(columns, dtype=float).T, note)


def check_scored(prompts: Prompts, columns: Sequence[str], skip_bad: bool = False) -> Prompts:
    """Check completions and rewards; return the prompts, not encoded, with those columns only.

    Rows without a finite reward are skipped and counted.

    Args:
        prompts: the rows, with their other columns.
        columns: the names of the columns that hold the rewards. NAME may also be `score.NAME`, or be in `scores`.
        skip_bad: skip rows whose completion or reward is invalid, instead of raising.

    Raises:
        UserError: a column is missing, a row is bad, or none is left.
    """
    prompts = restore_chats(prompts)
    rewards = {name: _find_rewards(prompts.columns, name) for name in columns}
    missing = [name for name, values in rewards.items() if values is None]
    missing += [] if COMPLETION in prompts.columns else [COMPLETION]
    if missing:
        raise UserError(
            f"scored_data: must have a column {missing[-1]!r} beside the prompt, and has "
            f"{quote_names(prompts.columns)}. Rename the columns, or set --reward_columns."
        )
    rows: list[Any] = []
    for i, completion in enumerate(prompts.columns[COMPLETION]):
        text = _text_of(completion)
        numbers = [_number_of(name, values[i]) for name, values in rewards.items() if values is not None]
        bad = next((value for value in (text, *numbers) if isinstance(value, BadRow)), None)
        rows.append(bad or (text, numbers))
    reasons = reasons_to_skip(prompts.locations, rows, skip_bad)
    for i, row in enumerate(rows):
        if reasons[i] is None and not all(map(math.isfinite, row[1])):
            reasons[i] = NO_REWARD
    good = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    checked = prompts.skip(reasons)
    checked.columns = {COMPLETION: [text for text, _ in good]}
    checked.columns |= {name: [numbers[a] for _, numbers in good] for a, name in enumerate(columns)}
    check_any_left(checked)
    return checked


def restore_chats(samples: Prompts) -> Prompts:
    """Return samples, not encoded, whose chats are messages. The files of a run have them as JSON."""
    return replace(samples, prompts=list(map(read_prompt_text, samples.prompts)), ids=[])


def distinct_prompts(samples: Prompts) -> Prompts:
    """Return each prompt of samples once, not encoded and without columns."""
    texts = list(map(prompt_text, samples.prompts))
    first = {text: index for index, text in reversed(list(enumerate(texts)))}
    prompts = samples.where([first[text] == index for index, text in enumerate(texts)])
    return replace(prompts, columns={}, skipped_rows=[])


def check_any_left(samples: Prompts) -> None:
    """Check that there is a sample.

    Raises:
        UserError: there is none.
    """
    if not len(samples):
        raise UserError(
            f"scored_data: no sample is left (rows skipped: {samples.skipped_in_words}). Provide at least one good row."
        )


def _find_rewards(columns: dict[str, list], name: str) -> list | None:
    """The values of a reward: in its own column, or where `quarkrl score` and `quarkrl samples` write them."""
    if "scores" in columns and name not in columns:
        return [row.get(name) if isinstance(row, dict) else None for row in columns["scores"]]
    return columns.get(name, columns.get(f"score.{name}"))


def _text_of(completion: Any) -> str | BadRow:
    if isinstance(completion, list) and len(completion) == 1 and not find_fault(completion):
        completion = message_text(completion[0])
    if not isinstance(completion, str):
        return BadRow("no completion", f"the completion is {shorten(completion)}", "Use text")
    if SURROGATE.search(completion):
        return BadRow("lone surrogate", f"half a character in {shorten(completion)}", "Use text that UTF-8 can encode")
    return completion


def _number_of(name: str, value: Any) -> float | BadRow:
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return BadRow("no number as reward", f"{name} is {shorten(value)}", "Use a number, or null for none")


# Token ids


def _without_end(text: str, end_tokens: Sequence[str | None]) -> str:
    """Return a text without the EOS that some files have at the end of each completion."""
    for token in end_tokens:
        text = text.removesuffix(token or "")
    return text


def _encode(tokenizer: Any, prompts: Prompts, texts: Sequence[str], ends: Ends) -> list[list[int] | None]:
    """Encode texts that continue the ids of prompts; None where no ids do.

    Prompt and completion are encoded as one. If a token spans both, the ids do not begin with those of the prompt. The
    completion is then encoded alone, or behind a line break, which keeps SentencePiece from adding a space. Such ids
    count only if they decode to the text.
    """
    if is_for_encoder(tokenizer):
        return _encode_alone(tokenizer, prompts, texts, ends)
    questions = prompts.as_encoded
    wholes = [
        prompt + text if isinstance(prompt, str) else with_completion(prompt, text)
        for prompt, text in zip(questions, texts, strict=True)
    ]
    results: list[list[int] | None] = [
        ids[len(start) :] if isinstance(ids, list) and ids[: len(start)] == start else None
        for ids, start in zip(try_encode_prompts(tokenizer, wholes), prompts.ids, strict=True)
    ]
    # A chat template may change a message, and may put spaces around it.
    chats = [i for i, prompt in enumerate(questions) if results[i] is not None and not isinstance(prompt, str)]
    for i, text in _decode(tokenizer, prompts, results, chats, ends):
        results[i] = results[i] if text.strip() == texts[i].strip() else None
    for start in ("", "\n"):
        rest = [i for i, ids in enumerate(results) if ids is None]
        (before,) = encode_plain_texts(tokenizer, [start])
        encoded = encode_plain_texts(tokenizer, [start + texts[i] for i in rest])
        tails = {i: ids[len(before) :] for i, ids in zip(rest, encoded, strict=True) if ids[: len(before)] == before}
        for i, text in _decode(tokenizer, prompts, tails, list(tails), ends):
            results[i] = tails[i] if text == texts[i] else None
    return results


def _encode_alone(tokenizer: Any, prompts: Prompts, texts: Sequence[str], ends: Ends) -> list[list[int] | None]:
    """Encode texts that a decoder writes; None where the ids do not decode to the text, spaces around it aside."""
    encoded: list[list[int] | None] = list(encode_plain_texts(tokenizer, texts))
    for i, text in _decode(tokenizer, prompts, encoded, list(range(len(texts))), ends):
        encoded[i] = encoded[i] if text.strip() == texts[i].strip() else None
    return encoded


def _decode(tokenizer: Any, prompts: Prompts, ids: Any, rows: list[int], ends: Ends) -> list[tuple[int, str]]:
    if not rows:
        return []
    keep = ends.all_ids if ends.keep_special_tokens else None
    completions, starts = [ids[i] for i in rows], [prompts.ids[i] for i in rows]
    texts = decode_completions(tokenizer, starts, completions, keep_special_tokens_before=keep)
    return list(zip(rows, texts, strict=True))


def _finish(ids: list[int] | None, end_id: int | None, ends: Ends) -> list[int]:
    """Return ids that end as the sampler ends them: cut off at the limit, or with EOS where EOS may occur."""
    ids = (ids or [])[: ends.max_length]
    ended = end_id is not None and ends.min_length <= len(ids) < ends.max_length
    return [*ids, end_id] if ended else ids  # type: ignore[list-item]


def _fault(ids: list[int] | None, finished: list[int], ends: Ends) -> str | None:
    if ids is None:
        return "that the tokenizer cannot write"
    if not set(ends.all_ids).isdisjoint(ids):
        return "with EOS in the middle"
    return None if finished else "empty"


def _describe(samples: Prompts, cut: int, unended: int, ends: Ends) -> str:
    distinct = len({tuple(ids) for ids in samples.ids})
    text = f"scored data: {len(samples):,} samples of {distinct:,} prompts"
    if samples.skipped_rows:
        text += f"; skipped: {samples.skipped_in_words}"
    if cut:
        text += f"; {cut:,} completions are cut off at {ends.max_length} tokens (--max_completion_length)"
    if unended and ends.min_length < ends.max_length:
        text += f"; {unended:,} are shorter than --min_completion_length {ends.min_length}, so their EOS is not learned"
    return text
