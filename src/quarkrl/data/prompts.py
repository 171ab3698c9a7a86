"""Prompts from a file, a data set or memory, checked row by row, and their token ids.

    prompts = load_prompts("train.jsonl").encode(tokenizer, max_length=64)

A source is one of:

- a file: `.jsonl` (one object per line), `.json` (the same, or one array), `.csv`, `.tsv`, `.parquet` or `.txt` (one
  prompt per line); the text formats also as `.gz`;
- a directory that `datasets.save_to_disk` wrote or that `datasets.load_dataset` reads;
- a data set on the hub, as NAME or NAME:CONFIGURATION;
- a `datasets.Dataset`, or a list of strings or dicts.

A prompt is a string, RealToxicityPrompts' nested `{"text": …, "toxicity": …}`, or a list of chat messages. A bad row is
an error that names its location, or it is skipped and counted (`skip_bad`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, compress
from typing import Any

from quarkrl.builtin import locate_prompts
from quarkrl.data.chat_defaults import LastTurn
from quarkrl.data.chats import RefusedChat, as_question, find_fault, is_continued, message_text
from quarkrl.data.encoding import RefusedText, try_encode_prompts, warn_of_second_bos
from quarkrl.data.readers import read_rows
from quarkrl.data.rows import SURROGATE, BadRow, Row, choose_column, one_completion_each, quote_names
from quarkrl.errors import UserError, shorten


@dataclass
class Prompts:
    """Prompts with their other columns; all lists are aligned.

    Attributes:
        prompts: texts, or lists of chat messages.
        columns: the other columns by name, None where a row has no value. Reward functions receive them.
        locations: where each prompt came from, "train.jsonl:17" or "row 5 of NAME", for messages.
        skipped_rows: for each skipped row the index of the prompt that followed it, and the reason.
        ids: token ids of each prompt; filled by `encode`, empty before.
        in_template: whether a text is encoded as a message of the user, in the chat template. Rewards get the text.
    """

    prompts: list[str | list[dict]]
    columns: dict[str, list]
    locations: list[str]
    skipped_rows: list[tuple[int, str]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    in_template: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def as_encoded(self) -> list[str | list[dict]]:
        """The prompts as they are encoded: texts and chats."""
        return list(map(as_question, self.prompts)) if self.in_template else self.prompts

    @property
    def are_chats(self) -> bool:
        """Whether a prompt is encoded as a chat."""
        return self.in_template or not all(isinstance(prompt, str) for prompt in self.prompts)

    @property
    def skipped(self) -> dict[str, int]:
        """The number of skipped rows by reason."""
        return dict(Counter(reason for _, reason in self.skipped_rows))

    @property
    def skipped_in_words(self) -> str:
        """The number of skipped rows by reason, such as "2 too long, 1 empty prompt"; "none" if none was."""
        return ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) or "none"

    @classmethod
    def join(cls, parts: Sequence[Prompts]) -> Prompts:
        """Return the prompts of all parts, in order. A column that a part lacks is None for its prompts."""
        names = dict.fromkeys(name for part in parts for name in part.columns)
        starts = accumulate(map(len, parts), initial=0)
        return cls(
            prompts=[prompt for part in parts for prompt in part.prompts],
            columns={
                name: [value for part in parts for value in part.columns.get(name, [None] * len(part))]
                for name in names
            },
            locations=[location for part in parts for location in part.locations],
            skipped_rows=[
                (start + index, reason)
                for start, part in zip(starts, parts, strict=False)
                for index, reason in part.skipped_rows
            ],
            ids=[ids for part in parts for ids in part.ids],
            in_template=any(part.in_template for part in parts),
        )

    def first(self, count: int) -> Prompts:
        """Return the first `count` prompts, not encoded, with the rows that were skipped before them."""
        columns = {name: values[:count] for name, values in self.columns.items()}
        skipped_rows = [(index, reason) for index, reason in self.skipped_rows if index < count]
        return replace(
            self,
            prompts=self.prompts[:count],
            columns=columns,
            locations=self.locations[:count],
            skipped_rows=skipped_rows,
            ids=[],
        )

    def skip(self, reasons: Sequence[str | None]) -> Prompts:
        """Return the prompts, not encoded, without those for which there is a reason to skip them."""
        kept = self.where([reason is None for reason in reasons])
        new_indices = accumulate((reason is None for reason in reasons), initial=0)
        kept.skipped_rows += [
            (index, reason) for index, reason in zip(new_indices, reasons, strict=False) if reason is not None
        ]
        return kept

    def where(self, keep: Sequence[bool]) -> Prompts:
        """Return the prompts, not encoded, whose place in `keep` is True."""
        new_indices = list(accumulate(keep, initial=0))
        return replace(
            self,
            ids=[],
            prompts=list(compress(self.prompts, keep)),
            columns={name: list(compress(values, keep)) for name, values in self.columns.items()},
            locations=list(compress(self.locations, keep)),
            skipped_rows=[(new_indices[index], reason) for index, reason in self.skipped_rows],
        )

    def with_last_turns(self, rule: LastTurn, skip_bad: bool = False) -> Prompts:
        """Return the prompts, not encoded, with a rule applied to chats that end with a message of the assistant.

        Args:
            rule: "refuse" raises; "continue" keeps them, so that the completion continues the message; "drop" drops
                the message, so that the completion answers again.
            skip_bad: skip the chats that the rule refuses, instead of raising.

        Raises:
            UserError: the rule refuses a chat.
        """
        if rule == "continue":
            return self
        prompts = list(self.prompts)
        results: list[BadRow | None] = [None] * len(self)
        for i, prompt in enumerate(self.prompts):
            if isinstance(prompt, str) or find_fault(prompt) or not is_continued(prompt):
                continue
            if rule == "drop" and len(prompt) > 1:
                prompts[i] = prompt[:-1]
            else:
                results[i] = _ENDS_WITH_ASSISTANT
        return replace(self, prompts=prompts, ids=[]).skip(reasons_to_skip(self.locations, results, skip_bad))

    def encode(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        skip_bad: bool = False,
        reserved: Sequence[str] = (),
        is_bad_start: Callable[[Sequence[int]], bool] = lambda ids: False,
        allow_none: bool = False,
        last_assistant_turn: LastTurn = "continue",
        in_template: bool = False,
    ) -> Prompts:
        """Encode the prompts as token ids (`data.encoding`) and check their lengths.

        Args:
            tokenizer: a `transformers` tokenizer.
            max_length: maximum prompt length in tokens, BOS and chat template included.
            skip_bad: skip prompts that are too long, have no tokens or contain reserved text, instead of raising.
            reserved: texts that a prompt must not contain, such as reward tokens.
            is_bad_start: whether the ids of a text start with a BOS that reward tokens follow in chats only.
            allow_none: return no prompts if all are skipped, instead of raising.
            last_assistant_turn: what happens to chats that end with a message of the assistant (`with_last_turns`).
            in_template: encode texts as messages of the user, also if the attribute `in_template` is False.

        Returns:
            The prompts with their `ids`, without those that are skipped.

        Raises:
            UserError: a prompt is bad, none is left, or there is a chat and the tokenizer has no chat template.
        """
        if max_length < 1:
            raise UserError(f"prompt length limit {max_length}: must be at least 1 token. Lower the completion length.")
        ended = replace(self, in_template=self.in_template or in_template)
        ended = ended.with_last_turns(last_assistant_turn, skip_bad)
        prompts = ended.as_encoded
        # A BadRow or None, later the ids.
        results: list[Any] = [_check_prompt(prompt) or _check_reserved(prompt, reserved) for prompt in prompts]
        good = [i for i, bad in enumerate(results) if bad is None]
        for i, ids in zip(good, try_encode_prompts(tokenizer, [prompts[i] for i in good]), strict=True):
            results[i] = _check_ids(prompts[i], ids, max_length, is_bad_start) or ids
        reasons = reasons_to_skip(ended.locations, results, skip_bad)
        encoded = ended.skip(reasons)
        encoded.ids = [ids for ids, reason in zip(results, reasons, strict=True) if reason is None]
        warn_of_second_bos(tokenizer, encoded.as_encoded, encoded.ids)
        if not allow_none:
            _check_any_left("the prompts", encoded)
        return encoded


_ENDS_WITH_ASSISTANT = BadRow(
    "ends with the assistant",
    "the chat ends with a message of the assistant",
    "Set --last_assistant_turn drop to have it answered again, or continue",
)


def load_prompts(
    source: Any,
    *,
    split: str = "train",
    column: str | Sequence[str] = "prompt",
    skip_bad: bool = False,
    allow_empty: bool = False,
    split_completions: bool = False,
    column_option: str | None = "prompt_column",
) -> Prompts:
    """Read and check prompts from any source that the module docstring lists.

    Args:
        source: a path, the name of a data set on the hub, a `datasets.Dataset` or `DatasetDict`, a list of strings
            or dicts, or a `TextStream`. A string is looked up as a path first.
        split: the split of a data set that has several; ignored otherwise.
        column: the column with the prompt, or several names of which the first existing one counts. `messages` is the
            fallback for `prompt`. Other fields of a nested prompt become columns `{column}_{field}`, unless the row
            has such a column.
        skip_bad: skip and count bad rows, instead of raising at the first one.
        allow_empty: accept empty texts. A prompt must not be empty, but a completion can be.
        split_completions: make a row with a column `completion` of each text in a list `completions`, which
            `quarkrl generate --json` writes.
        column_option: the option of the command that sets `column`, for messages; None if there is none.

    Raises:
        UserError: the source cannot be read, a row is bad, or no row is left.
    """
    if isinstance(source, str):
        source = locate_prompts(source, split) or source
    name, raw_rows = read_rows(source, split)
    if not raw_rows:
        raise UserError(f"{name}: there are no rows in it. Provide at least one prompt.")
    if split_completions:
        raw_rows = [(location, part) for location, row in raw_rows for part in one_completion_each(row)]
    column = choose_column(name, [row for _, row in raw_rows], column, column_option)
    prompts = check_rows(raw_rows, column, skip_bad=skip_bad, allow_empty=allow_empty)
    _check_any_left(name, prompts)
    return prompts


def check_rows(rows: Sequence[Row], column: str, *, skip_bad: bool, allow_empty: bool = False) -> Prompts:
    """Check rows and return their prompts, maybe none; see `load_prompts`.

    Raises:
        UserError: a row is bad, and `skip_bad` is False.
    """
    results = [row if isinstance(row, BadRow) else _check_row(row, column, allow_empty) for _, row in rows]
    locations = [location for location, _ in rows]
    reasons = reasons_to_skip(locations, results, skip_bad)
    good: list[Any] = [("", {}) if reason else row for row, reason in zip(results, reasons, strict=True)]
    names = dict.fromkeys(key for _, others in good for key in others)
    columns = {key: [others.get(key) for _, others in good] for key in names}
    return Prompts([prompt for prompt, _ in good], columns, locations).skip(reasons)


def reasons_to_skip(locations: Sequence[str], results: Sequence[Any], skip_bad: bool) -> list[str | None]:
    """Return for each result the reason to skip it, or None.

    Raises:
        UserError: there is a BadRow and `skip_bad` is False.
    """
    for location, result in zip(locations, results, strict=True):
        if isinstance(result, BadRow) and not skip_bad:
            raise UserError(f"{location}: {result.problem}. {result.remedy}, or skip such rows: --skip_bad_prompts.")
    return [result.reason if isinstance(result, BadRow) else None for result in results]


def _check_any_left(name: str, prompts: Prompts) -> None:
    if not len(prompts):
        raise UserError(
            f"{name}: no prompt is left (rows skipped: {prompts.skipped_in_words}). Provide at least one good row."
        )


def _check_row(row: object, column: str, allow_empty: bool) -> tuple[str | list[dict], dict] | BadRow:
    """Return the row's prompt and its other columns."""
    if isinstance(row, str):
        row = {column: row}
    if not isinstance(row, dict):
        return BadRow("not an object", f"the row is {shorten(row)}", "Use an object with a prompt")
    if column not in row:
        return BadRow("no prompt", f"no {column!r} among {quote_names(row)}", "Add a prompt to the row")
    others = {key: value for key, value in row.items() if key != column}
    prompt = row[column]
    if isinstance(prompt, dict):
        if "text" not in prompt:
            return BadRow("wrong type", f"a prompt object without 'text': {shorten(prompt)}", "Add a 'text'")
        for key, value in prompt.items():
            if key != "text":
                others.setdefault(f"{column}_{key}", value)
        prompt = prompt["text"]
    return _check_prompt(prompt, allow_empty) or (prompt, others)


def _check_prompt(prompt: object, allow_empty: bool = False) -> BadRow | None:
    if prompt is None:
        return BadRow("no prompt", "the prompt is null", "Use text")
    if isinstance(prompt, str):
        texts = [prompt]
    elif not isinstance(prompt, list):
        return BadRow("wrong type", f"the prompt is {shorten(prompt)}", "Use a string or a list of messages")
    elif fault := find_fault(prompt):
        remedy = 'Use a list of {"role": "…", "content": "…"}'
        return BadRow("malformed messages", f"malformed chat messages {shorten(prompt)}: {fault}", remedy)
    else:
        texts = [message_text(message) for message in prompt]
    if not allow_empty and not any(text.strip() for text in texts):
        return BadRow("empty prompt", f"the prompt is empty: {shorten(prompt)}", "Use text")
    if any(map(SURROGATE.search, texts)):
        return BadRow("lone surrogate", f"half a character in {shorten(prompt)}", "Use text that UTF-8 can encode")
    return None


def _check_reserved(prompt: str | list[dict], reserved: Sequence[str]) -> BadRow | None:
    # Tool calls included.
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str)
    for name in reserved:
        if name in text:
            return BadRow("contains a reward token", f"the prompt contains the reward token {name}", "Remove it")
    return None


def _check_ids(
    prompt: object,
    ids: list[int] | RefusedChat | RefusedText,
    max_length: int,
    is_bad_start: Callable[[Sequence[int]], bool],
) -> BadRow | None:
    if isinstance(ids, RefusedChat):
        problem = f"the chat template refuses {shorten(prompt)} ({ids.reason})"
        return BadRow("refused by the chat template", problem, "Change the messages")
    if isinstance(ids, RefusedText):
        problem = f"the tokenizer refuses {shorten(prompt)} ({ids.reason})"
        return BadRow("refused by the tokenizer", problem, "Change the text")
    if not ids:
        return BadRow("no tokens", "the prompt has no tokens", "Use text that the tokenizer knows")
    if isinstance(prompt, str) and is_bad_start(ids):
        problem = "the text starts with BOS, which this tokenizer adds to chats only"
        return BadRow("starts with BOS", problem, "Remove it, use chat messages")
    if len(ids) > max_length:
        return BadRow(
            "too long", f"the prompt has {len(ids)} tokens, limit {max_length}", "Shorten it, raise the limit"
        )
    return None
