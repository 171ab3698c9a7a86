"""Readers of text formats: the bytes of a file become rows with their locations.

A row that cannot be read becomes a `BadRow`, so that the rows around it are kept. Lines and rows are numbered from 1.
A line feed ends a line, and a carriage return where there is no line feed (Excel for Mac). U+2028 and similar
characters do not. Text is UTF-8, or UTF-16 with a byte order mark.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from quarkrl.data.rows import SURROGATE, BadRow, Row, not_utf8
from quarkrl.errors import UserError, one_line, shorten

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SEPARATOR_LINE = re.compile(r"sep=([,;\t|])\r?")  # Excel writes and reads it as the first line.


class Line(NamedTuple):
    """A line of a file: its location for messages, its text, and a BadRow if it is not text."""

    location: str
    text: str
    bad: BadRow | None


def read_text(name: str, data: bytes) -> list[Row]:
    """Read a prompt per line."""
    return [(line.location, line.bad or line.text.removesuffix("\r")) for line in _split_lines(name, data)]


def read_jsonl(name: str, data: bytes) -> list[Row]:
    """Read a JSON object per line."""
    lines = _split_lines(name, data)
    return [(line.location, line.bad or _parse_object(line.text)) for line in lines if line.text.strip()]


def read_json(name: str, data: bytes) -> list[Row]:
    """Read one array of objects or texts, one object, or an object per line.

    Raises:
        UserError: the array is malformed.
    """
    lines = _split_lines(name, data)
    text = "\n".join(line.text for line in lines)
    is_array = text.lstrip().startswith("[")
    for line in lines if is_array else ():
        if line.bad:
            raise UserError(f"{line.location}: {line.bad.problem}. {line.bad.remedy}.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not is_array:
            return read_jsonl(name, data)
        location = f"{name}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else name
        raise UserError(
            f"{location}: malformed JSON ({one_line(error)}). Fix the array, or write one JSON object per line."
        ) from error
    if isinstance(value, list):
        return [(f"row {i} of {name}", row) for i, row in enumerate(value, 1)]
    return [(f"{name}:1", value)] if isinstance(value, dict) else read_jsonl(name, data)


def read_csv(name: str, data: bytes) -> list[Row]:
    """Read rows below a header. Fields are separated by what separates the header: commas, semicolons, tabs or bars.

    Raises:
        UserError: the header is malformed.
    """
    lines = _split_lines(name, data)
    stated = _SEPARATOR_LINE.fullmatch(lines[0].text) if lines else None
    if stated:
        return list(_parse_csv(lines[1:], stated[1]))
    header = next((line.text for line in lines if line.text.strip()), "")
    widths = {separator: _count_fields(header, separator) for separator in _SEPARATORS}
    return list(_parse_csv(lines, max(widths, key=lambda separator: widths[separator])))  # A comma if widths tie.


def read_tsv(name: str, data: bytes) -> list[Row]:
    """Read rows below a header, with fields separated by tabs.

    Raises:
        UserError: the header is malformed.
    """
    return list(_parse_csv(_split_lines(name, data), "\t"))


def _count_fields(line: str, separator: str) -> int:
    try:
        with _unlimited_fields():
            return len(next(csv.reader([line], delimiter=separator)))
    except csv.Error:
        return 0


def _parse_object(text: str) -> dict | BadRow:
    remedy = "Write one JSON object per line"
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow("malformed JSON", f"malformed JSON {shorten(text)} ({one_line(error)})", remedy)
    return row if isinstance(row, dict) else BadRow("not an object", f"not a JSON object: {shorten(row)}", remedy)


def _split_lines(name: str, data: bytes) -> list[Line]:
    """Split the bytes of a file into lines."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = data.decode("utf-16").encode("utf-8")
        except UnicodeError as error:
            raise UserError(f"{name}: the file is damaged UTF-16. Save it as UTF-8.") from error
    # A byte that is not UTF-8 becomes a surrogate, which valid UTF-8 never contains.
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    texts = (text if "\n" in text else text.replace("\r", "\n")).split("\n")
    if not texts[-1]:
        texts.pop()
    return [Line(f"{name}:{number}", text, _find_fault(text)) for number, text in enumerate(texts, 1)]


def _find_fault(text: str) -> BadRow | None:
    if "\0" in text:
        return BadRow("not text", "there is a NUL character, so this is UTF-16 or no text", "Save the text as UTF-8")
    match = None if text.isascii() else SURROGATE.search(text)
    return not_utf8(ord(match.group()) - 0xDC00) if match else None


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    """Lift the limit of 128 KB that the csv module sets for a field."""
    limit = csv.field_size_limit(2**31 - 1)  # The largest value on every platform.
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parse_csv(lines: list[Line], separator: str) -> Iterator[Row]:
    position = 0  # The number of lines read so far.

    def remaining_lines() -> Iterator[str]:
        nonlocal position
        while position < len(lines):
            position += 1
            yield lines[position - 1].text + "\n"

    header: list[str] = []
    reader = csv.reader(remaining_lines(), strict=True, delimiter=separator)
    while position < len(lines):
        first = position
        try:
            with _unlimited_fields():
                fields, error = next(reader), None
        except csv.Error as malformed:
            fields, error = [], malformed
            # An open quote extends over all lines that follow. Restart after its line, or good rows are lost.
            position, reader = first + 1, csv.reader(remaining_lines(), strict=True, delimiter=separator)
        line = next((entry for entry in lines[first:position] if entry.bad), lines[first])
        bad = line.bad or _describe_row(line.text, fields, error, header, separator)
        if not header and (bad or len(set(fields)) < len(fields)):
            problem = bad.problem if bad else "two columns have the same name"
            raise UserError(f"{line.location}: {problem}. Fix the header.")
        if header and (bad or fields):  # Not for an empty line.
            yield line.location, bad or dict(zip(header, fields, strict=True))
        header = header or fields


def _describe_row(
    text: str, fields: list[str], error: csv.Error | None, header: list[str], separator: str
) -> BadRow | None:
    """Return what is wrong with a row; None if it is good."""
    if error:
        problem = f"malformed CSV {shorten(text)} ({error})"
        return BadRow("malformed CSV", problem, "Close the quotes, and double quotes inside a field")
    if header and fields and len(fields) != len(header):
        problem = f"{len(fields)} fields where the header has {len(header)}: {shorten(text)}"
        return BadRow("wrong field count", problem, f"Quote text that contains {_SEPARATORS[separator]}")
    return None
