"""Rows of prompt sources: what every reader returns."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from quarkrl.errors import shorten

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


def quote_names(names: Iterable[object], count: int = 10) -> str:
    """Quote the first names for a message: "'a', 'b'", or "none"."""
    quoted = [shorten(name, 40) for name in names]
    return ", ".join([*quoted[:count], *(["…"] if len(quoted) > count else [])]) or "none"
