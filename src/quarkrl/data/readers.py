"""Readers of prompt sources: files, directories and data sets become rows with their locations.

A row that cannot be read becomes a `BadRow`, so that the rows around it are kept. Lines and rows are numbered from 1.
Only a line feed ends a line; U+2028 and similar characters do not.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from quarkrl.errors import UserError, did_you_mean, one_line, shorten

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


def read_rows(source: Any, split: str) -> tuple[str, list[Row]]:
    """Read all rows of a source.

    Args:
        source: a path, the name of a data set, a `datasets.Dataset` or `DatasetDict`, or a list. A string is looked up
            as a path first.
        split: the split of a data set that has several.

    Returns:
        The name of the source for messages, and its rows.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    if isinstance(source, (list, tuple)):
        return "the list", [(f"row {i} of the list", row) for i, row in enumerate(source, 1)]
    if not isinstance(source, (str, os.PathLike)):
        return _read_dataset("the data set", source, split)
    name = os.path.expanduser(os.fspath(source))
    path = Path(name)
    reader = _READERS.get(path.suffix.lower())
    if not os.path.exists(name):
        is_path = not isinstance(source, str) or name.startswith((".", "/", "~")) or "\\" in name
        if is_path or reader or not name:
            raise UserError(_describe_missing(path, name))
    if not os.path.isfile(name):
        return _read_dataset(name, _load_dataset(name, split), split)
    if not reader:
        raise UserError(f"{name}: unknown suffix {path.suffix!r}; must be one of {quote_names(_READERS)}.")
    try:
        if not path.stat().st_size:
            raise UserError(f"{name}: the file is empty. Write at least one prompt into it.")
        return name, list(reader(path))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({one_line(error)}). Fix the cause.") from error


def quote_names(names: Iterable[object], count: int = 10) -> str:
    """Quote the first names for a message: "'a', 'b'", or "none"."""
    quoted = [shorten(name, 40) for name in names]
    return ", ".join([*quoted[:count], *(["…"] if len(quoted) > count else [])]) or "none"


def _describe_missing(path: Path, name: str) -> str:
    if not path.parent.is_dir():
        return f"{name}: no such file, and no directory {str(path.parent)!r}. Provide an existing file."
    prefix = "" if path.parent == Path() else f"{path.parent}{os.sep}"
    suggestion = did_you_mean(path.name, os.listdir(path.parent), prefix)
    return f"{name or repr(name)}: no such file.{suggestion or ' Provide an existing file.'}"


# Data sets


def _load_dataset(name: str, split: str) -> Any:
    import datasets

    is_directory = os.path.isdir(name)
    try:
        if os.path.exists(f"{name}/state.json") or os.path.exists(f"{name}/dataset_dict.json"):
            return datasets.load_from_disk(name)
        # An absolute path, because load_dataset("csv") is a format even if there is a directory of that name.
        names = [os.path.abspath(name)] if is_directory else name.split(":", 1)  # NAME, or NAME:CONFIGURATION
        return datasets.load_dataset(*names, split=split)
    except Exception as error:  # Formats, network and hub raise many types; the message keeps the cause.
        cause: BaseException = error
        if "while generating the dataset" in str(error) and error.__cause__:
            cause = error.__cause__  # The more specific error.
        origin = "the directory has" if is_directory else "there is no such file, and the hub has"
        raise UserError(
            f"{shorten(name, 200)}: {origin} no split {split!r} that can be read ({one_line(cause)}). "
            "Provide a prompt file, or the directory or name of a data set."
        ) from error


def _read_dataset(name: str, dataset: Any, split: str) -> tuple[str, list[Row]]:
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{name}: there is no split {split!r}; must be one of {quote_names(dataset)}.")
        name, dataset = f"{name} ({split})", dataset[split]
    if not isinstance(dataset, datasets.Dataset):
        raise UserError(
            f"prompts: must be a path, the name of a data set, a datasets.Dataset (not a streamed one) or a list, "
            f"not {type(dataset).__name__}."
        )
    return name, [(f"row {i} of {name}", row) for i, row in enumerate(_decode_rows(dataset), 1)]


def _decode_rows(dataset: Any) -> list[Any]:
    try:
        return dataset.to_list()
    except UnicodeDecodeError as error:
        if len(dataset) == 1:
            return [_not_utf8(error.object[error.start])]
        halves = [dataset.shard(2, i, contiguous=True) for i in range(2)]  # Bisect for the bad rows.
        return _decode_rows(halves[0]) + _decode_rows(halves[1])


def _read_parquet(path: Path) -> list[Row]:
    import datasets
    import pyarrow.parquet

    try:
        # `datasets` decodes columns of mixed types, which it stores as JSON and Arrow alone does not decode.
        dataset = datasets.Dataset(pyarrow.parquet.ParquetFile(path).read())
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({one_line(error)}). Write it again, as Parquet of plain types."
        ) from error
    return _read_dataset(str(path), dataset, split="")[1]


# Text files


def _read_text(path: Path) -> list[Row]:
    return [(location, bad or line.removesuffix("\r")) for location, line, bad in _read_lines(path)]


def _read_jsonl(path: Path) -> list[Row]:
    return [(location, bad or _parse_json(line)) for location, line, bad in _read_lines(path) if line.strip()]


def _parse_json(line: str) -> dict | BadRow:
    remedy = "Write one JSON object per line"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow("malformed JSON", f"malformed JSON {shorten(line)} ({one_line(error)})", remedy)
    return row if isinstance(row, dict) else BadRow("not an object", f"not a JSON object: {shorten(row)}", remedy)


def _read_lines(path: Path) -> list[tuple[str, str, BadRow | None]]:
    """Read the lines of a file: location, text, and a BadRow if the line is not UTF-8."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: the file is UTF-16. Save it as UTF-8.")
    # A byte that is not UTF-8 becomes a surrogate, which valid UTF-8 never contains.
    lines = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff").split("\n")
    matches = [None if line.isascii() else SURROGATE.search(line) for line in lines]
    bad_rows = [_not_utf8(ord(match.group()) - 0xDC00) if match else None for match in matches]
    locations = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    return list(zip(locations, lines, bad_rows, strict=True))[: None if lines[-1] else -1]


def _not_utf8(byte: int) -> BadRow:
    return BadRow("not UTF-8", f"byte 0x{byte:02x} is not UTF-8", "Save the text as UTF-8")


def _read_csv(path: Path) -> Iterator[Row]:
    lines = _read_lines(path)
    position = 0  # The number of lines read so far.

    def remaining_lines() -> Iterator[str]:
        nonlocal position
        while position < len(lines):
            position += 1
            yield lines[position - 1][1] + "\n"

    header: list[str] = []
    reader = csv.reader(remaining_lines(), strict=True)
    while position < len(lines):
        first = position
        try:
            fields, error = next(reader), None
        except csv.Error as malformed:
            fields, error = [], malformed
            # An open quote extends over all lines that follow. Restart after its line, or good rows are lost.
            position, reader = first + 1, csv.reader(remaining_lines(), strict=True)
        location, line, bad = next((entry for entry in lines[first:position] if entry[2]), lines[first])
        if error and not bad:
            problem = f"malformed CSV {shorten(line)} ({error})"
            bad = BadRow("malformed CSV", problem, "Close the quotes, and double quotes inside a field")
        elif header and fields and not bad and len(fields) != len(header):
            problem = f"{len(fields)} fields where the header has {len(header)}: {shorten(line)}"
            bad = BadRow("wrong field count", problem, "Quote text that contains commas")
        if not header and (bad or len(set(fields)) < len(fields)):
            problem = bad.problem if bad else "two columns have the same name"
            raise UserError(f"{location}: {problem}. Fix the header.")
        if header and (bad or fields):  # Not for an empty line.
            yield location, bad or dict(zip(header, fields, strict=True))
        header = header or fields


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
