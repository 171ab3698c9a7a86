"""Rows of prompt sources: what every reader returns."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from quarkrl.errors import UserError, shorten

# Columns that are likely to hold the prompt, where there is none of the requested name.
_USUAL_COLUMNS = ("text", "prompts", "question", "query", "instruction", "input", "conversations", "content")
SURROGATE = re.compile("[\ud800-\udfff]")


class BadRow(NamedTuple):
    """A row that cannot be used.

    Attributes:
        reason: the name under which such rows are counted.
        problem: what is wrong with this row.
        remedy: what the user can do.
    """

    reason: str
    problem: str
    remedy: str


# A row's location, for messages, and its content: a dict, a prompt as text, or a BadRow.
Row: TypeAlias = tuple[str, Any]


def not_utf8(byte: int) -> BadRow:
    """Return the row whose text has a byte that is not UTF-8."""
    return BadRow("not UTF-8", f"byte 0x{byte:02x} is not UTF-8", "Save the text as UTF-8")


def restore_chats(row: Any) -> Any:
    """Return a row of an Arrow table whose chats have the fields that were written.

    Arrow gives each struct of a column all fields of the others, as null. A message without tool calls gets
    `tool_calls: null`, which some chat templates refuse. The arguments of a call get those of all calls.
    """
    if not isinstance(row, dict):
        return row
    return {name: _without_nulls(value) if _is_chat(value) else value for name, value in row.items()}


def one_completion_each(row: Any) -> list[Any]:
    """Return a row for each text in the list `completions` of a row; a row without such a list is returned alone."""
    completions = row.get("completions") if isinstance(row, dict) else None
    if not isinstance(completions, list):
        return [row]
    others = {name: value for name, value in row.items() if name != "completions"}
    return [{**others, "completion": text} for text in completions]


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def choose_column(
    name: str, rows: Sequence[object], column: str | Sequence[str], option: str | None = "prompt_column"
) -> str:
    """Choose the prompt column: the first requested one that a row has.

    Args:
        name: of the source, for messages.
        rows: those of the source.
        column: the requested column, or several. `messages` is the fallback for `prompt`.
        option: what sets the column, for messages; None if there is no such option.

    Raises:
        UserError: no row has such a column, but others.
    """
    names = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    requested = [column] if isinstance(column, str) else [*column]
    candidates = [*requested, *(["messages"] if "prompt" in requested else [])]
    existing = [candidate for candidate in candidates if candidate in names]
    if names and not existing:
        likely = next((usual for usual in _USUAL_COLUMNS if usual in names), next(iter(names)))
        remedy = f"Rename the column to {requested[0]!r}"
        if option is not None:
            remedy = f"Set --{option} {likely} (in Python: load_prompts(…, column={likely!r}))"
        raise UserError(
            f"{name}: there is no column {' or '.join(map(repr, requested))}; must be one of {quote_names(names)}. "
            f"{remedy}."
        )
    return (existing or requested)[0]


def quote_names(names: Iterable[object], count: int = 10) -> str:
    """Quote the first names for a message: "'a', 'b'", or "none"."""
    quoted = [shorten(name, 40) for name in names]
    return ", ".join([*quoted[:count], *(["…"] if len(quoted) > count else [])]) or "none"
